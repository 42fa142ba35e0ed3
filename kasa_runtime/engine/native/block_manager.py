"""Which blocks of the KV cache are free, whose the others are, and what can be found in them.

A full block is known by a hash of everything that its keys and values depend on: the tokens up to
its end, the adapter that computed them, and the state of the weights. Sequences that begin alike
share such blocks. One that nobody uses counts as free, and stays findable until it is the least
recently used of them and room is needed.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

HASH_BYTES = 16  # of a cryptographic hash: nobody finds two contents with one hash


def root_hash(adapter: str | None, num_merges: int, salt: str = "") -> bytes:
    """Where the hashes of a sequence's blocks begin: what keys and values depend on besides tokens,
    and `salt`, which tells apart who may share them.

    `adapter` is the key of an adapter's version, never its slot, which others get later; None is
    the base. `num_merges` counts how often the weights have changed. Merged ones give the same keys
    and values but for rounding; even that ends with the merge, as later requests find nothing from
    before it."""
    return blake2b(repr((adapter, num_merges, salt)).encode(), digest_size=HASH_BYTES).digest()


def block_hash(before: bytes, token_ids: Sequence[int]) -> bytes:
    """The hash of a full block after the block, or the root, whose hash is `before`."""
    content = before + array("q", token_ids).tobytes()
    return blake2b(content, digest_size=HASH_BYTES).digest()


class BlockManager:
    """A pool of `num_blocks` blocks of `block_size` tokens. Step thread only."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._blank = list(range(num_blocks - 1, -1, -1))  # free, nothing to be found in them
        self._idle: OrderedDict[int, None] = OrderedDict()  # free and findable, oldest first
        self._num_users: Counter[int] = Counter()  # of the blocks that are not free
        self._blocks: dict[bytes, int] = {}  # by hash: the findable ones
        self._hashes: dict[int, bytes] = {}  # the same, by block

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._idle)

    @property
    def usage(self) -> float:
        """Share of the blocks in use, 0 to 1."""
        return 1.0 - self.num_free / self.num_blocks

    def num_missing(self, block_table: list[int], num_tokens: int) -> int:
        """How many blocks more a sequence needs to hold `num_tokens` tokens."""
        return max(0, -(-num_tokens // self.block_size) - len(block_table))

    def can_grow(self, block_table: list[int], num_tokens: int) -> bool:
        return self.num_missing(block_table, num_tokens) <= self.num_free

    def grow(self, block_table: list[int], num_tokens: int) -> None:
        """Append blocks until the table holds `num_tokens`. The caller has asked `can_grow`."""
        for _ in range(self.num_missing(block_table, num_tokens)):
            block = self._blank.pop() if self._blank else self._evict()
            self._num_users[block] = 1
            block_table.append(block)

    def share(self, block_table: list[int], hashes: Sequence[bytes]) -> None:
        """Append the blocks with these hashes, up to the first that cannot be found."""
        for wanted in hashes:
            block = self._blocks.get(wanted)
            if block is None:
                return
            self._idle.pop(block, None)
            self._num_users[block] += 1
            block_table.append(block)

    def publish(self, block: int, content: bytes) -> None:
        """Make a block findable by its hash. All of it is written, and none of it will be again.

        Of two blocks with one content, the first published is the one that is found."""
        if content not in self._blocks:
            self._blocks[content] = block
            self._hashes[block] = content

    def free(self, block_table: list[int]) -> None:
        """Take the sequence's blocks back and empty its table. Of what stays findable its last
        block is evicted first, since without those before it nothing finds it."""
        for block in reversed(block_table):
            self._num_users[block] -= 1
            if self._num_users[block]:
                continue
            del self._num_users[block]
            if block in self._hashes:
                self._idle[block] = None
            else:
                self._blank.append(block)
        block_table.clear()

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._blocks[self._hashes.pop(block)]
        return block
