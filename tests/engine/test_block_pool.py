"""The pool's books, and what is forgotten first."""

import pytest

from llmopt.engine.block_pool import BlockPool
from llmopt.errors import LlmoptError

BLOCK_SIZE = 4


def keep(pool: BlockPool, names: str) -> None:
    """Fill a block for each letter, name it by the letter, give all up."""
    table: list[int] = []
    assert pool.grow(table, len(names) * BLOCK_SIZE)
    for block, name in zip(table, names, strict=True):
        pool.name(block, name.encode())
    pool.release(table)


def found(pool: BlockPool, names: str) -> int:
    return len(pool.find(name.encode() for name in names))


def test_what_has_gone_unused_longest_is_forgotten_first_and_ends_before_beginnings() -> None:
    pool = BlockPool(6, BLOCK_SIZE)
    keep(pool, "abc")
    keep(pool, "xyz")
    table: list[int] = []
    assert pool.grow(table, 1, pool.find([b"a"]))
    pool.release(table)  # a is the freshest now
    assert (pool.free, pool.cached, pool.used) == (0, 6, 0)
    forgotten = []
    for _ in range(6):
        assert pool.grow(table, (len(table) + 1) * BLOCK_SIZE)
        forgotten += [name for name in "abcxyz" if name not in forgotten and not found(pool, name)]
        pool.check([table])
    assert "".join(forgotten) == "cbzyxa"


def test_free_blocks_are_taken_before_anything_is_forgotten() -> None:
    pool = BlockPool(6, BLOCK_SIZE)
    keep(pool, "abc")
    table: list[int] = []
    assert pool.grow(table, 3 * BLOCK_SIZE)
    assert found(pool, "abc") == 3
    assert (pool.free, pool.cached, pool.used) == (0, 3, 3)


def test_only_an_unbroken_beginning_is_found() -> None:
    pool = BlockPool(6, BLOCK_SIZE)
    keep(pool, "abc")
    assert [found(pool, names) for names in ("abc", "abx", "axc", "bc", "")] == [3, 2, 1, 2, 0]


def test_shared_blocks_are_held_until_the_last_gives_them_up() -> None:
    pool = BlockPool(4, BLOCK_SIZE)
    keep(pool, "ab")
    first: list[int] = []
    second: list[int] = []
    for table in (first, second):
        assert pool.grow(table, 3 * BLOCK_SIZE, pool.find([b"a", b"b"]))
        pool.check([first, second])
    assert first[:2] == second[:2] and first[2] != second[2]
    assert not pool.grow([], 1), "all four are held"
    pool.release(first)
    pool.check([first, second])
    assert (pool.free, pool.cached, pool.used) == (1, 0, 3)
    pool.release(second)
    pool.check([])
    assert (pool.free, pool.cached, pool.used) == (2, 2, 0)


def test_what_is_found_is_not_counted_as_room_too() -> None:
    pool = BlockPool(3, BLOCK_SIZE)
    keep(pool, "abc")
    table: list[int] = []
    assert not pool.grow(table, 4 * BLOCK_SIZE, pool.find([b"a", b"b", b"c"]))
    assert not pool.grow(table, 3 * BLOCK_SIZE, pool.find([b"a"]), spare=1)
    assert table == [] and pool.cached == 3
    assert pool.grow(table, 2 * BLOCK_SIZE, pool.find([b"a"]), spare=1)
    pool.check([table])


def test_of_two_blocks_with_the_same_tokens_one_is_kept() -> None:
    pool = BlockPool(4, BLOCK_SIZE)
    first: list[int] = []
    second: list[int] = []
    for table in (first, second):
        assert pool.grow(table, BLOCK_SIZE)
        pool.name(table[0], b"a")
    assert pool.find([b"a"]) == first
    pool.release(first)
    pool.release(second)
    pool.check([])
    assert (pool.free, pool.cached) == (3, 1)


def test_lost_blocks_are_noticed() -> None:
    pool = BlockPool(4, BLOCK_SIZE)
    table: list[int] = []
    assert pool.grow(table, 9)
    assert len(table) == 3 and pool.used == 3
    assert not pool.grow([], 8), "two blocks are wanted, one is free"
    pool.check([table])
    with pytest.raises(LlmoptError, match="lost its books"):
        pool.check([table[:-1]])
    with pytest.raises(LlmoptError, match="lost its books"):
        pool.check([table, [table[0]]])
