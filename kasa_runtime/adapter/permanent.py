"""Which adapters have a slot for good: those that are pinned, and the one that is merged.

A pin is of a name: what the name stands for stays in its slot, whichever version that is. It can be
evicted only while another version of the name is merged and there is no room for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from kasa_runtime.adapter.catalog import Catalog
from kasa_runtime.adapter.names import name_of
from kasa_runtime.errors import CapacityExceeded


class Permanent:
    """Event loop only."""

    def __init__(self, max_slots: int, catalog: Catalog) -> None:
        self.merged: str | None = None  # key
        self.pinned: set[str] = set()  # names
        self.changed: Callable[[], None] = lambda: None  # called when `names` has changed
        self._max_slots = max_slots
        self._catalog = catalog
        self._merging = ""  # name

    def names(self) -> set[str]:
        """Names that have a slot whatever requests come."""
        names = {name for name in self.pinned if name in self._catalog}
        names |= {self._merging} if self._merging else set()
        return names | ({name_of(self.merged)} if self.merged else set())

    def is_pinned(self, key: str) -> bool:
        return name_of(key) in self.pinned and self._catalog.is_current(key)

    def __contains__(self, key: str) -> bool:
        return key == self.merged or (self.is_pinned(key) and not self._gives_way(key))

    def _gives_way(self, key: str) -> bool:
        is_other = self.merged not in (None, key) and name_of(self.merged or "") == name_of(key)
        return is_other and len(self.pinned) + 1 >= self._max_slots

    def pin(self, name: str) -> bool:
        """Whether it was not pinned before. Raises CapacityExceeded if no slot would be left."""
        if name in self.pinned:
            return False
        self._require_room({*self.names(), *self.pinned, name})
        self.pinned.add(name)
        self.changed()
        return True

    def unpin(self, name: str) -> None:
        self.pinned.discard(name)
        self.changed()

    @contextmanager
    def about_to_merge(self, name: str) -> Iterator[None]:
        """While it waits for a slot, one is kept for it as for those that have theirs. Raises
        CapacityExceeded if none would be left beside those that are pinned."""
        if self.pinned:
            self._require_room({*self.pinned, name})
        self._merging = name
        self.changed()
        try:
            yield
        finally:
            self._merging = ""
            self.changed()

    def require_others(self, resident: Iterable[str]) -> None:
        """Raises CapacityExceeded if the merged one has the only slot."""
        if self._max_slots == 1 and self.merged and self.merged in resident:
            raise CapacityExceeded(
                f"{self.merged} is merged and has the only slot; unmerge it or raise max_slots"
            )

    def _require_room(self, names: set[str]) -> None:
        if len(names) >= self._max_slots:
            raise CapacityExceeded(
                f"{', '.join(sorted(names))} would have slots for good, and of the "
                f"{self._max_slots} slots at least one has to be left to others; unload or unmerge "
                "one of them, or raise max_slots"
            )
