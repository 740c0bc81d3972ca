"""xᵀ x against float64, of numbers that were rounded as the kernel rounds them."""

import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmopt.backend import gram as gram_module
from llmopt.backend import select
from llmopt.backend.gram import BLOCK, add_gram, fast_gram

_cpu = pytest.importorskip("llmopt.kernels._cpu", reason="the compiled kernels are not built")

INSTRUCTION_SETS = _cpu.instruction_sets()
MULTIPLIERS = {(name, threads): _cpu.Multiplier(threads, name) for name in INSTRUCTION_SETS for threads in (1, 2)}
ROWS_AT_ONCE = 4096  # of the kernel


def random_rows(rows: int, width: int, seed: int) -> torch.Tensor:
    """With channels of very different loudness, as in real models."""
    generator = torch.Generator().manual_seed(seed)
    loudness = torch.exp2(torch.randint(-12, 12, (width,), generator=generator).float())
    return torch.randn(rows, width, generator=generator) * loudness


def symmetric(width: int, size: float, seed: int) -> torch.Tensor:
    half = torch.randn(width, width, generator=torch.Generator().manual_seed(seed)) * size
    return half + half.T


def check(add, x: torch.Tensor, before: torch.Tensor, rounded_to: torch.dtype) -> None:
    """`add` adds xᵀ x, of x in a dtype, to `before`, to within the rounding of a float32 sum in any order."""
    after = before.clone()
    add(after, x)
    exact = x.to(rounded_to).double()
    allowed = (len(x) + 2) * 2.0**-23 * (exact.abs().T @ exact.abs() + before.abs()) + 1e-30
    assert ((after.double() - (before.double() + exact.T @ exact)).abs() <= allowed).all()
    assert torch.equal(after, after.T)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@settings(deadline=None, max_examples=40)
@given(st.integers(0, 70), st.integers(0, 200), st.integers(0, 10**6))
@example(1, 1, 0)
@example(1, 150, 0)
@example(2, 48, 0)
@example(5, 47, 0)
@example(5, 49, 0)
@example(64, 192, 0)
@example(ROWS_AT_ONCE, 3, 0)
@example(ROWS_AT_ONCE + 1, 50, 0)
@example(2 * ROWS_AT_ONCE + 7, 97, 0)
def test_it_is_the_sum_of_products_of_rounded_numbers(name: str, rows: int, width: int, seed: int) -> None:
    x = random_rows(rows, width, seed)
    for before in (torch.zeros(width, width), symmetric(width, 100.0, seed + 1)):
        check(MULTIPLIERS[name, 2].add_gram, x, before, torch.bfloat16)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 40), st.integers(0, 3), st.integers(-1, 40), st.integers(0, 10**6))
def test_plain_torch_does_the_same_without_rounding(rows: int, blocks: int, more: int, seed: int) -> None:
    width = max(0, blocks * BLOCK + more)
    check(add_gram, random_rows(rows, width, seed), symmetric(width, 1.0, seed), torch.float32)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (33, 200), (ROWS_AT_ONCE + 5, 145)])
def test_the_number_of_threads_changes_no_bit(name: str, rows: int, width: int) -> None:
    x = random_rows(rows, width, seed=3)
    grams = []
    for threads in (1, 2):
        grams.append(symmetric(width, 1.0, seed=4))
        MULTIPLIERS[name, threads].add_gram(grams[-1], x)
    assert torch.equal(*grams)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_halves_are_rounded_to_even(name: str) -> None:
    """Which one number cannot tell from a wrong sum: x times a one in the next column is x as it was rounded."""
    halves = (torch.arange(-300, 300) * (1 << 16) + (1 << 15)).int() + 0x3F800000
    x = halves.view(torch.float32)
    found = torch.zeros(601, 601)
    MULTIPLIERS[name, 1].add_gram(found, torch.cat([x, torch.ones(1)])[None])
    assert torch.equal(found[:600, 600], x.bfloat16().float())


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("bits", [0x7FC00000, -0x00400000, 0x7F800001, 0x7FFFFFFF, -1])
@pytest.mark.parametrize("column", [0, 47, 48, 60])
def test_nan_is_not_hidden_and_stays_in_its_column(name: str, bits: int, column: int) -> None:
    x = torch.ones(5, 61)
    x[3, column] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    found = torch.zeros(61, 61)
    MULTIPLIERS[name, 2].add_gram(found, x)
    touched = torch.zeros(61, 61, dtype=torch.bool)
    touched[column], touched[:, column] = True, True
    assert torch.equal(found.isnan(), touched)
    assert (found[~touched] == 5).all()


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_infinity_is_infinity(name: str) -> None:
    x = torch.ones(3, 61)
    x[1, 60], x[2, 5] = torch.inf, 3.4e38  # which rounds up to infinity
    found = torch.zeros(61, 61)
    MULTIPLIERS[name, 2].add_gram(found, x)
    assert torch.equal(found, x.bfloat16().float().T @ x.bfloat16().float())


@pytest.mark.parametrize(
    "gram",
    [
        torch.zeros(4, 5),
        torch.zeros(5, 5),
        torch.zeros(4),
        torch.zeros(4, 4, dtype=torch.float64),
        torch.zeros(4, 8)[:, ::2],
    ],
)
def test_what_could_not_be_written_is_refused(gram: torch.Tensor) -> None:
    """What is written to a converted copy would be lost without a word."""
    with pytest.raises((ValueError, TypeError)):
        MULTIPLIERS[INSTRUCTION_SETS[0], 1].add_gram(gram, torch.ones(3, 4))


@pytest.mark.parametrize(("device", "products"), [("cpu", torch.float32), ("cuda", torch.bfloat16)])
def test_torch_serves_what_is_not_bfloat16_on_the_cpu(device: str, products: torch.dtype) -> None:
    assert fast_gram(device, products) is add_gram


def test_torch_serves_where_the_kernels_are_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "_multiplier", select._multiplier.__wrapped__)  # which has kept what it found
    monkeypatch.setitem(sys.modules, "llmopt.kernels._cpu", None)
    assert select.multiplier() is None
    assert fast_gram("cpu", torch.bfloat16) is add_gram


def test_the_kernel_takes_rows_that_lie_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram_module, "multiplier", lambda: MULTIPLIERS[INSTRUCTION_SETS[0], 2])
    x = random_rows(70, 33, seed=5)
    for rows in (x.T.contiguous().T, torch.cat([x, x], 1)[:, 33:], torch.cat([x, x])[::2]):
        check(fast_gram("cpu", torch.bfloat16), rows, torch.zeros(33, 33), torch.bfloat16)


def test_the_kernels_have_as_many_threads_as_torch() -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert select.multiplier().threads == threads
    finally:
        torch.set_num_threads(before)
