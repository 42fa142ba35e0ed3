"""The block manager alone: who uses which block, what is found in it, what is evicted first."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kasa_runtime.engine.native.block_manager import BlockManager, block_hash, root_hash

SIZE = 2
Content = tuple[str | None, int, tuple[int, ...], str]
CONTENTS = st.tuples(
    st.sampled_from([None, "", "None", "a@1", "a@2"]),
    st.integers(0, 1),
    st.lists(st.integers(0, 1), min_size=1, max_size=10).map(tuple),
    st.sampled_from(["", "None", "a@1"]),
)


def hashes(content: Content) -> list[bytes]:
    """Of all full blocks."""
    adapter, num_merges, token_ids, salt = content
    found = [root_hash(adapter, num_merges, salt)]
    for i in range(0, len(token_ids) - SIZE + 1, SIZE):
        found.append(block_hash(found[-1], token_ids[i : i + SIZE]))
    return found[1:]


class Users(RuleBasedStateMachine):
    """Sequences that come, write their blocks and go."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(6, SIZE)
        self.tables: list[tuple[list[int], Content, int]] = []  # with the number of full blocks
        self.written: dict[int, Content] = {}  # by block: all up to its end

    @rule(content=CONTENTS)
    def come(self, content: Content) -> None:
        table: list[int] = []
        known = hashes(content)
        self.blocks.share(table, known)
        for i, block in enumerate(table):
            assert self.written[block] == self.prefix(content, i), "another's keys and values"
        num_found, length = len(table), len(content[2])
        if not self.blocks.can_grow(table, length):
            self.blocks.free(table)
            return
        self.blocks.grow(table, length)
        for i, block in enumerate(table[num_found:], num_found):
            assert not any(block in other for other, _, _ in self.tables), "written, and read"
            assert block not in self.blocks._hashes, "written, and found"
            self.written[block] = self.prefix(content, i)
        self.tables.append((table, content, num_found))

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 5))
    def publish(self, which: int) -> None:
        table, content, _ = self.tables[which % len(self.tables)]
        for block, known in zip(table, hashes(content), strict=False):
            self.blocks.publish(block, known)

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 5))
    def go(self, which: int) -> None:
        table, _, _ = self.tables.pop(which % len(self.tables))
        self.blocks.free(table)
        assert table == []

    @invariant()
    def every_block_is_free_or_used(self) -> None:
        used = [block for table, _, _ in self.tables for block in table]
        blank, idle = self.blocks._blank, list(self.blocks._idle)
        assert sorted({*used, *blank, *idle}) == list(range(6))
        assert len(set(used)) + len(blank) + len(idle) == 6
        assert self.blocks.num_free == len(blank) + len(idle)
        assert self.blocks._num_users == {block: used.count(block) for block in used}

    @invariant()
    def a_hash_finds_its_content(self) -> None:
        assert {block: known for known, block in self.blocks._blocks.items()} == self.blocks._hashes
        assert not set(self.blocks._blank) & set(self.blocks._hashes)
        assert set(self.blocks._idle) <= set(self.blocks._hashes)
        for block, known in self.blocks._hashes.items():
            assert hashes(self.written[block])[-1] == known

    def teardown(self) -> None:
        for table, _, _ in self.tables:
            self.blocks.free(table)
        assert self.blocks.num_free == 6

    @staticmethod
    def prefix(content: Content, block: int) -> Content:
        adapter, num_merges, token_ids, salt = content
        return adapter, num_merges, token_ids[: (block + 1) * SIZE], salt


TestUsers = Users.TestCase
TestUsers.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, derandomize=True
)


def filled(blocks: BlockManager, content: Content) -> list[int]:
    """The blocks of a sequence that has computed them all."""
    table: list[int] = []
    blocks.grow(table, len(content[2]))
    for block, known in zip(table, hashes(content), strict=False):
        blocks.publish(block, known)
    return table


def num_found(blocks: BlockManager, content: Content) -> int:
    table: list[int] = []
    blocks.share(table, hashes(content))
    found = len(table)
    blocks.free(table)
    return found


def test_the_least_recently_used_is_evicted_first_and_its_end_before_its_beginning() -> None:
    blocks = BlockManager(6, SIZE)
    first, second = (None, 0, (1,) * 4, ""), (None, 0, (2,) * 4, "")
    tables = [filled(blocks, first), filled(blocks, second)]
    for table in tables:
        blocks.free(table)
    assert (num_found(blocks, first), num_found(blocks, second)) == (2, 2)
    assert num_found(blocks, first) == 2  # the last one used
    taken: list[int] = []
    left = []
    for length in range(0, 13, 2):
        blocks.grow(taken, length)
        left.append([len(set(hashes(c)) & set(blocks._blocks)) for c in (first, second)])
    assert left[:3] == [[2, 2]] * 3, "blank blocks are taken before any is evicted"
    assert left[3:] == [[2, 1], [2, 0], [1, 0], [0, 0]]


def test_a_block_in_use_is_not_evicted() -> None:
    blocks = BlockManager(3, SIZE)
    content: Content = ("a@1", 0, (5, 6), "")
    table = filled(blocks, content)
    assert not blocks.can_grow([], 6)
    other: list[int] = []
    blocks.grow(other, 4)
    assert blocks.num_free == 0 and num_found(blocks, content) == 1
    blocks.free(table)
    blocks.free(other)


def test_a_shared_block_is_free_after_its_last_user() -> None:
    blocks = BlockManager(3, SIZE)
    content: Content = (None, 0, (5, 6), "")
    first = filled(blocks, content)
    second: list[int] = []
    blocks.share(second, hashes(content))
    assert first == second and blocks.num_free == 2
    blocks.free(first)
    assert blocks.num_free == 2
    blocks.free(second)
    assert blocks.num_free == 3


def test_of_two_blocks_with_one_content_the_first_is_found() -> None:
    blocks = BlockManager(3, SIZE)
    content: Content = (None, 0, (5, 6), "")
    first, second = filled(blocks, content), filled(blocks, content)
    found: list[int] = []
    blocks.share(found, hashes(content))
    assert found == first != second
    for table in (found, first, second):
        blocks.free(table)
    assert blocks.num_free == 3 and num_found(blocks, content) == 1


def test_different_contents_have_different_hashes() -> None:
    contents: list[Content] = [
        (None, 0, (1, 2), ""),
        ("None", 0, (1, 2), ""),
        ("", 0, (1, 2), ""),
        ("a@1", 0, (1, 2), ""),
        ("a@2", 0, (1, 2), ""),
        (None, 0, (1, 2), "a@1"),
        ("a@1", 0, (1, 2), "a@1"),
        ("a@2", 1, (1, 2), ""),
        ("a@2", 1, (2, 1), ""),
        ("a@2", 1, (1, 2, 1, 2), ""),
    ]
    assert len({hashes(content)[-1] for content in contents}) == len(contents)


def test_blocks_are_counted_by_need() -> None:
    blocks = BlockManager(3, 4)
    table: list[int] = []
    assert blocks.num_missing(table, 4) == 1 and blocks.num_missing(table, 5) == 2
    assert blocks.can_grow(table, 12) and not blocks.can_grow(table, 13)
    blocks.grow(table, 5)
    assert (len(table), blocks.num_free, blocks.num_missing(table, 8)) == (2, 1, 0)
    blocks.grow(table, 3)
    assert len(table) == 2, "shrinking is not asked for"
    blocks.free(table)
    assert (table, blocks.num_free, blocks.usage) == ([], 3, 0.0)
