"""Which adapter is in which slot of the executor."""

from __future__ import annotations

from kasa_runtime.engine.native.executor import NO_SLOT
from kasa_runtime.errors import CapacityExceeded


class SlotTable:
    """Keys of adapters to slot numbers. Changed on the event loop only, one change at a time."""

    def __init__(self, num_slots: int) -> None:
        self._keys: list[str | None] = [None] * num_slots

    def copy(self) -> SlotTable:
        table = SlotTable(0)
        table._keys = list(self._keys)
        return table

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def find(self, key: str | None) -> int:
        """The adapter's slot, NO_SLOT for None. Raises KeyError if it is not loaded."""
        if key is None:
            return NO_SLOT
        if key not in self._keys:
            raise KeyError(key)
        return self._keys.index(key)

    def take(self, key: str) -> int:
        """A free slot, now the adapter's. Raises CapacityExceeded when there is none."""
        if None not in self._keys:
            raise CapacityExceeded(
                f"all {len(self._keys)} adapter slots are taken; unload one or raise max_slots"
            )
        slot = self._keys.index(None)
        self._keys[slot] = key
        return slot

    def release(self, key: str) -> int:
        """Free the adapter's slot and return it. Raises KeyError if it is not loaded."""
        slot = self.find(key)
        self._keys[slot] = None
        return slot
