"""The compiled kernels against the reference, on every instruction set that this processor has."""

import logging
import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.backend.reference import ReferenceBackend
from llmopt.errors import LlmoptError
from llmopt.weights.quantized import QuantizedTensor

_cpu = pytest.importorskip("llmopt.kernels._cpu", reason="the compiled kernels are not built")
cpu = pytest.importorskip("llmopt.backend.cpu")

INSTRUCTION_SETS = _cpu.instruction_sets()
KNOWN_SETS = ("plain", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "avx512_amx")

# One backend for each combination, as an engine has one: threads are not started anew for each example.
BACKENDS = {(name, threads): cpu.CpuBackend(threads, name) for name in INSTRUCTION_SETS for threads in (1, 2, 3)}
REFERENCE = ReferenceBackend()


def random_weight(
    out: int,
    groups: int,
    group_size: int,
    bits: int = 4,
    *,
    symmetric: bool = True,
    act_order: bool = False,
    activations: str | None = None,
    spread: float = 1.0,
    seed: int = 0,
) -> QuantizedTensor:
    """A weight of random codes; its scales span `spread` orders of magnitude either way."""
    generator = torch.Generator().manual_seed(seed)
    wide, most = groups * group_size, 1 << bits
    codes = torch.randint(0, most, (out, wide), generator=generator, dtype=torch.uint8)
    scales = 0.02 * 10 ** ((2 * torch.rand(out, groups, generator=generator) - 1) * spread)
    zeros = torch.randint(0, most, (out, groups), generator=generator, dtype=torch.uint8)
    index = (torch.arange(wide) // group_size)[torch.randperm(wide, generator=generator)].int()
    return QuantizedTensor(codes, scales, None if symmetric else zeros, index if act_order else None, bits, activations)


def activations(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def check_same(backend, weights, biases, x: torch.Tensor) -> None:
    """The same result as the reference's, to 1e-5 of what each output adds up in magnitude."""
    actual = backend.pack(weights, biases)(x)
    exact = REFERENCE.pack(weights, biases)
    expected = exact(x)
    magnitude = x.abs() @ exact.weight.abs().T + (0 if exact.bias is None else exact.bias.abs())
    assert actual.shape == expected.shape
    assert actual.dtype == torch.float32
    excess = (actual - expected).abs() - 1e-5 * magnitude
    assert excess.max() <= 0, f"off by {(actual - expected).abs().max()} where outputs reach {expected.abs().max()}"


# Sizes of groups and how many of them: usual ones, whole rows, and ones that no vector width divides.
GROUPINGS = [(16, 1), (16, 5), (32, 3), (32, 4), (64, 1), (64, 3), (96, 1), (96, 2), (77, 1), (10, 3), (1, 9)]


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 200),
    grouping=st.sampled_from(GROUPINGS),
    bits=st.integers(2, 8),
    kind=st.fixed_dictionaries({"symmetric": st.booleans(), "act_order": st.booleans()}),
    spread=st.sampled_from([0.0, 1.0, 6.0]),
    zero_group=st.integers(-1, 4),
    biased=st.booleans(),
    tokens=st.integers(1, 70),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 2**31),
)
def test_products_agree_with_the_reference(
    name, out, grouping, bits, kind, spread, zero_group, biased, tokens, threads, seed
):
    group_size, groups = grouping
    weight = random_weight(out, groups, group_size, bits, **kind, spread=spread, seed=seed)
    x = activations(tokens, weight.shape[1], seed)
    if 0 <= zero_group < groups:  # a group that is all zeros, and with it a token and an output that are
        weight.scales[:, zero_group] = 0
        weight.scales[out // 2] = 0
        x[tokens // 2] = 0
    check_same(BACKENDS[name, threads], [weight], [torch.linspace(-1, 1, out) if biased else None], x)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("tokens", [1, 2, 20])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_at_its_zero_point_is_nothing_at_all(name, tokens, bits):
    """Adding up x * code and x * zero apart would leave a rounding error, which this group's scale makes large."""
    weight = random_weight(20, 2, 32, bits, symmetric=False)
    weight.codes[:, :32] = weight.zeros[:, :1]
    weight.scales[:] = torch.tensor([1e6, 1e-3])
    check_same(BACKENDS[name, 1], [weight], [None], activations(tokens, 64))


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("tokens", [0, 1, 4, 5, 12, 13, 479, 480, 481, 1000])
def test_any_number_of_tokens(name, tokens):
    weight = random_weight(49, 3, 64, symmetric=False)
    linear = BACKENDS[name, 2].pack([weight], [None])
    x = activations(tokens, 192)
    assert linear(x).shape == (tokens, 49)
    if tokens:
        check_same(BACKENDS[name, 2], [weight], [None], x)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize(
    ("dtype", "scales"),
    [
        (torch.float16, [6e-8, 3e-5, 1.0, 65000.0]),
        (torch.bfloat16, [1e-20, 1e-8, 1.0, 1e20]),
        (torch.float32, [1e-20, 1e-8, 1.0, 1e20]),
    ],
)
def test_scales_of_every_dtype_keep_their_value(name, dtype, scales):
    """Also where they are subnormal in float16, or too large or too small for it."""
    codes = random_weight(24, 4, 32).codes
    weight = QuantizedTensor(codes, torch.tensor(scales).expand(24, 4).to(dtype), None, None, 4)
    backend = BACKENDS[name, 1]
    for group in range(4):  # one group at a time, else the largest scale would hide the others
        x = torch.zeros(2, 128)
        x[:, group * 32 : group * 32 + 32] = activations(2, 32)
        check_same(backend, [weight], [None], x)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("tokens", [1, 3, 40])
@settings(max_examples=20, deadline=None)
@given(out=st.integers(1, 100), width=st.integers(1, 130), bits=st.sampled_from([4, 8]), seed=st.integers(0, 2**31))
def test_int8_activations_agree_with_the_reference(name, tokens, out, width, bits, seed):
    weight = random_weight(out, 1, width, bits, activations="int8", seed=seed)
    x = activations(tokens, width, seed)
    x[-1] = 0
    check_same(BACKENDS[name, 2], [weight], [torch.linspace(-1, 1, out)], x)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("value", [0, 255])
def test_int8_sums_are_exact_where_products_are_largest(name, value):
    """Pairs of 255 * 127 do not fit 16 bits: an instruction that saturates would be found here."""
    weight = random_weight(17, 1, 4096, 8, activations="int8")
    weight.codes[:] = value
    weight.scales[:] = 1.0
    x = torch.full((2, 4096), 127.0)
    result = BACKENDS[name, 1].pack([weight], [None])(x)
    assert torch.equal(result, torch.full((2, 17), (value - 128) * 127.0 * 4096))


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_int8_codes_round_halves_to_even(name):
    """With a scale of 1 (the largest is 127), 0.5 becomes 0, 1.5 and 2.5 become 2."""
    weight = random_weight(1, 1, 4, 8, activations="int8")
    weight.codes[:] = torch.tensor([128, 129, 129, 129], dtype=torch.uint8)
    weight.scales[:] = 1.0
    result = BACKENDS[name, 1].pack([weight], [None])(torch.tensor([[127.0, 0.5, 1.5, 2.5]]))
    assert result.item() == 0 + 2 + 2


@pytest.mark.parametrize("rounding", [None, "int8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(rounding, bad):
    weight = random_weight(20, 1, 64, 8, activations=rounding)
    x = activations(3, 64)
    x[1, 5] = bad
    result = BACKENDS[INSTRUCTION_SETS[0], 1].pack([weight], [None])(x)
    assert not result[1].isfinite().any()
    assert result[[0, 2]].isfinite().all()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_weights_side_by_side(threads):
    """Two that can be merged, one of other bits, one of another group size and a dense one; with and without bias."""
    parts = [
        random_weight(20, 3, 64, seed=1),
        random_weight(33, 3, 64, seed=2),
        random_weight(7, 3, 64, 8, seed=3),
        random_weight(40, 6, 32, seed=4),
        torch.randn(11, 192),
    ]
    biases = [None, torch.randn(33), torch.randn(7), None, torch.randn(11)]
    for tokens in (1, 20):
        check_same(BACKENDS[INSTRUCTION_SETS[0], threads], parts, biases, activations(tokens, 192))


def test_what_shares_everything_but_outputs_is_packed_once():
    backend = BACKENDS[INSTRUCTION_SETS[0], 1]
    index = random_weight(1, 3, 64, act_order=True).group_index
    plain = [random_weight(20, 3, 64, seed=n) for n in range(3)]
    ordered = [QuantizedTensor(w.codes, w.scales, None, index, 4) for w in plain]
    others = [QuantizedTensor(w.codes, w.scales, None, index.flip(0), 4) for w in plain]
    assert len(backend.pack(plain, [None] * 3).parts) == 1
    assert len(backend.pack(ordered, [None] * 3).parts) == 1
    assert len(backend.pack(ordered + others, [None] * 6).parts) == 2
    check_same(backend, ordered + others, [None] * 6, activations(3, 192))


def unequal_groups(sizes: list[int]) -> QuantizedTensor:
    """A weight whose groups have these sizes, in a random order of inputs."""
    plain = random_weight(30, len(sizes), sum(sizes) // len(sizes))
    index = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return QuantizedTensor(plain.codes, plain.scales, None, index[torch.randperm(len(index))].int(), 4)


def test_groups_of_unequal_size():
    """What a group index may say beyond a permutation, an empty group included."""
    backend = BACKENDS[INSTRUCTION_SETS[0], 2]
    weight = unequal_groups([20, 0, 13, 31])
    assert isinstance(backend.pack([weight], [None]), cpu.CpuLinear)
    check_same(backend, [weight], [None], activations(5, 64))


@pytest.mark.parametrize(
    ("weight", "word"),
    [
        (random_weight(8, 2, 32, 8, activations="int8"), "one scale a row"),
        (random_weight(8, 1, 64, 8, activations="int8", symmetric=False), "symmetric"),
        (unequal_groups([61, 1, 1, 1]), "unequal"),
        (replace(random_weight(8, 2, 32), number="fp4"), "not in float32"),
    ],
)
def test_what_the_kernels_cannot_do_goes_to_the_reference_with_one_warning(weight, word, caplog):
    backend = cpu.CpuBackend(1)
    with caplog.at_level(logging.WARNING, logger="llmopt.backend.cpu"):
        for _ in range(3):
            check_same(backend, [weight], [None], activations(2, 64))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert word in messages[0]


def test_dense_weights_are_torchs_without_a_word(caplog):
    check_same(cpu.CpuBackend(1), [torch.randn(8, 64), torch.randn(5, 64)], [None, None], activations(2, 64))
    assert not caplog.records


def test_activations_may_lie_anywhere():
    weight = random_weight(20, 2, 32)
    every_other_column = activations(4, 128)[:, ::2]
    check_same(BACKENDS[INSTRUCTION_SETS[0], 1], [weight], [None], every_other_column)
    check_same(BACKENDS[INSTRUCTION_SETS[0], 1], [weight], [None], activations(8, 64)[::2])


@pytest.mark.parametrize("x", [torch.randn(2, 63), torch.randn(2, 64, dtype=torch.float64), torch.randn(64)])
def test_activations_of_another_shape_or_dtype_are_refused(x):
    linear = BACKENDS[INSTRUCTION_SETS[0], 1].pack([random_weight(20, 2, 32)], [None])
    with pytest.raises(ValueError, match=r"float32 \[T, 64\]"):
        linear(x)


@pytest.mark.parametrize("name", ["sse9", *(name for name in KNOWN_SETS if name not in INSTRUCTION_SETS)])
def test_an_instruction_set_that_is_not_there_is_refused(name):
    with pytest.raises(LlmoptError, match=f"{name}.*plain"):
        cpu.CpuBackend(1, name)


def test_the_fastest_instruction_set_comes_first_and_plain_always_last():
    assert INSTRUCTION_SETS[-1] == "plain"
    ranks = [KNOWN_SETS.index(name) for name in INSTRUCTION_SETS]
    assert ranks == sorted(ranks, reverse=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_computes_and_exits():
    """Threads do not live through a fork; neither waiting for them nor joining them may hang the child."""
    backend = cpu.CpuBackend(3)
    weight = random_weight(64, 2, 32)
    linear, x = backend.pack([weight], [None]), activations(1, 64)
    expected = linear(x)
    child = os.fork()
    if child == 0:
        same = torch.equal(linear(x), expected)
        del linear, backend
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(linear(x), expected)


def test_two_callers_at_once_get_their_own_results():
    """An engine calls from one thread; two must at least not spoil each other's results."""
    from concurrent.futures import ThreadPoolExecutor

    backend = BACKENDS[INSTRUCTION_SETS[0], 2]
    weights = [random_weight(64, 2, 32, seed=n) for n in range(2)]
    linears = [backend.pack([weight], [None]) for weight in weights]
    inputs = [activations(20, 64, seed=n) for n in range(2)]
    expected = [linear(x) for linear, x in zip(linears, inputs, strict=True)]
    with ThreadPoolExecutor(2) as callers:
        for _ in range(50):
            results = list(callers.map(lambda n: linears[n](inputs[n]), range(2)))
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
