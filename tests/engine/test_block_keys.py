"""Keys say what is in a block and all before it, and say it to this process alone."""

import pytest

from llmopt.engine.block_keys import BlockKeys
from llmopt.engine.params import SamplingParams
from llmopt.engine.request import Request

KEYS = BlockKeys(4)


def keys_of(tokens: list[int], salt: str | None = None, keys: BlockKeys = KEYS) -> list[bytes]:
    request = Request("r", tokens, SamplingParams(), 0, cache_salt=salt)
    keys.catch_up(request)
    return request.keys


def test_one_key_for_each_full_block() -> None:
    assert [len(keys_of([1] * length)) for length in (1, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]


def test_a_key_tells_of_all_tokens_up_to_its_block() -> None:
    one, other = keys_of([1, 2, 3, 4, 5, 6, 7, 8, 9]), keys_of([1, 2, 3, 0, 5, 6, 7, 8, 9])
    assert one == keys_of([1, 2, 3, 4, 5, 6, 7, 8, 10])
    assert not set(one) & set(other)
    assert len(set(keys_of([1] * 40))) == 10, "the same block at another place is another"


def test_tokens_that_come_later_add_keys() -> None:
    request = Request("r", [1, 2, 3, 4, 5], SamplingParams(), 0)
    KEYS.catch_up(request)
    request.tokens += [6, 7, 8, 9]
    KEYS.catch_up(request)
    assert request.keys == keys_of([1, 2, 3, 4, 5, 6, 7, 8])


@pytest.mark.parametrize("salt", ["a", "b", "\0" * 16, "é"])
def test_a_salt_changes_all_keys(salt) -> None:
    plain, salted = keys_of([1] * 12), keys_of([1] * 12, salt)
    assert not set(plain) & set(salted)
    assert salted == keys_of([1] * 12, salt) != keys_of([1] * 12, salt + "c")


def test_another_process_has_other_keys() -> None:
    assert not set(keys_of([1] * 12)) & set(keys_of([1] * 12, keys=BlockKeys(4)))
