"""Which blocks of the KV cache are free, and whose the others are."""

from __future__ import annotations


class BlockManager:
    """A pool of `num_blocks` blocks of `block_size` tokens. Step thread only."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the blocks in use, 0 to 1."""
        return 1.0 - len(self._free) / self.num_blocks

    def num_missing(self, block_table: list[int], num_tokens: int) -> int:
        """How many blocks more a sequence needs to hold `num_tokens` tokens."""
        return max(0, -(-num_tokens // self.block_size) - len(block_table))

    def can_grow(self, block_table: list[int], num_tokens: int) -> bool:
        return self.num_missing(block_table, num_tokens) <= len(self._free)

    def grow(self, block_table: list[int], num_tokens: int) -> None:
        """Append blocks until the table holds `num_tokens`. The caller has asked `can_grow`."""
        for _ in range(self.num_missing(block_table, num_tokens)):
            block_table.append(self._free.pop())

    def free(self, block_table: list[int]) -> None:
        """Take the sequence's blocks back and empty its table."""
        self._free.extend(reversed(block_table))
        block_table.clear()
