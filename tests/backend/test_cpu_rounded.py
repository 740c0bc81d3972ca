"""Products with rounded activations, on every instruction set that this processor has."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.backend.reference import ReferenceBackend
from llmopt.weights.quantized import QuantizedTensor, TwoLevel

_cpu = pytest.importorskip("llmopt.kernels._cpu", reason="the compiled kernels are not built")
cpu_rounded = pytest.importorskip("llmopt.backend.cpu_rounded")

INSTRUCTION_SETS = _cpu.instruction_sets()
BACKENDS = {
    (name, threads): cpu_rounded.RoundedCpuBackend(threads, name) for name in INSTRUCTION_SETS for threads in (1, 2)
}
REFERENCE = ReferenceBackend()
KINDS = ("symmetric", "zeros", "minimums", "two levels", "two levels with minimums", "nvfp4", "mxfp4")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_weight(
    kind: str, out: int, groups: int, group_size: int, bits: int, seed: int, *, act_order: bool = False
) -> QuantizedTensor:
    """A weight of random codes whose scales and minimums are as `kind` says; FP4 has 4 bits, whatever `bits` says."""
    source = generator(seed)
    if kind in ("nvfp4", "mxfp4"):
        return random_fp4(kind, out, groups, group_size, source, act_order=act_order)
    wide, most = groups * group_size, 1 << bits
    codes = torch.randint(0, most, (out, wide), generator=source, dtype=torch.uint8)
    floats = 0.01 + 0.02 * torch.rand(out, groups, generator=source)
    runs = next(runs for runs in (groups // 4, groups // 2, groups) if runs and groups % runs == 0)
    bytes_ = [torch.randint(-30, 60, (out, groups), generator=source, dtype=torch.int8) for _ in range(2)]
    factors = [0.001 * (1 + torch.rand(out, runs, generator=source)).half() for _ in range(2)]
    two_levels = [TwoLevel(values, factor) for values, factor in zip(bytes_, factors, strict=True)]
    zeros = torch.randint(0, most, (out, groups), generator=source, dtype=torch.uint8)
    return QuantizedTensor(
        codes,
        two_levels[0] if kind.startswith("two levels") else floats,
        zeros if kind == "zeros" else None,
        random_order(wide, group_size, source) if act_order else None,
        bits,
        minimums={"minimums": -floats * 3, "two levels with minimums": two_levels[1]}.get(kind),
    )


def random_order(width: int, group_size: int, source: torch.Generator) -> torch.Tensor:
    """The group of each input, where groups are not runs."""
    return (torch.arange(width) // group_size)[torch.randperm(width, generator=source)].int()


def random_fp4(kind: str, out: int, groups: int, group_size: int, source, *, act_order: bool) -> QuantizedTensor:
    codes = torch.randint(0, 16, (out, groups * group_size), generator=source, dtype=torch.uint8)
    if kind == "mxfp4":
        # All that float16 holds, so that it is tried too; then all that there are.
        low, high = ((105, 140), (30, 160))[int(torch.randint(2, (), generator=source))]
        exponents = torch.randint(low, high, (out, groups), generator=source, dtype=torch.uint8)
        scales = exponents.view(torch.float8_e8m0fnu)
    else:
        values = torch.randint(0, 0x7F, (out, groups), generator=source, dtype=torch.uint8)  # subnormal ones as well
        scales = TwoLevel(values.view(torch.float8_e4m3fn), torch.tensor([[0.00123]]))
    index = random_order(groups * group_size, group_size, source) if act_order else None
    return QuantizedTensor(codes, scales, None, index, 4, number="fp4")


def whole_numbers(tokens: int, width: int, seed: int) -> torch.Tensor:
    """Activations that rounding leaves as they are: every run of 8 holds 127, so that every scale is 1."""
    x = torch.randint(-127, 128, (tokens, width), generator=generator(seed)).float()
    x[:, ::8] = 127
    return x


def check_exact(backend, weight, x: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """The reference's product, to 1e-5 of what each output adds up in magnitude."""
    exact = REFERENCE.pack([weight], [bias])
    magnitude = x.abs() @ exact.weight.abs().T + 127 * exact.weight.abs().amax()
    excess = (backend.pack([weight], [bias])(x) - exact(x)).abs() - 1e-5 * magnitude
    assert excess.max() <= 0


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    out=st.integers(1, 100),
    grouping=st.sampled_from([(8, 5), (16, 4), (16, 16), (32, 1), (32, 8), (64, 3), (96, 2), (128, 2), (576, 1)]),
    bits=st.integers(2, 8),
    biased=st.booleans(),
    tokens=st.integers(1, 40),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**31),
)
def test_what_rounding_leaves_alone_is_multiplied_exactly(
    name, kind, out, grouping, bits, biased, tokens, threads, seed
):
    group_size, groups = grouping
    weight = random_weight(kind, out, groups, group_size, bits, seed)
    bias = torch.linspace(-1, 1, out) if biased else None
    check_exact(BACKENDS[name, threads], weight, whole_numbers(tokens, weight.shape[1], seed), bias)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize(("bits", "number"), [(4, "int"), (6, "int"), (8, "int"), (4, "fp4")])
def test_the_largest_sums_fit(name, bits, number, tokens, sign):
    """All products of a step alike and as large as they can be: 16 bits that saturate or overflow would be found."""
    top, zero = (7, None) if number == "fp4" else (2**bits - 1, torch.zeros(20, 2, dtype=torch.uint8))
    codes = torch.full((20, 128), top, dtype=torch.uint8)
    weight = QuantizedTensor(codes, torch.ones(20, 2), zero, None, bits, number=number)
    check_exact(BACKENDS[name, 1], weight, torch.full((tokens, 128), sign * 127.0))


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("kind", ["zeros", "nvfp4"])
def test_inputs_in_another_order(name, tokens, kind):
    weight = random_weight(kind, 40, 4, 32, 4, seed=1, act_order=True)
    x = torch.full((tokens, 128), 127.0) * torch.randint(-1, 2, (tokens, 128), generator=generator(2))
    check_exact(BACKENDS[name, 2], weight, x)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    grouping=st.sampled_from([(16, 8), (32, 4), (64, 3), (128, 2), (576, 1)]),
    bits=st.sampled_from([4, 5, 6, 8]),
    spread=st.sampled_from([0.0, 3.0]),
    seed=st.integers(0, 2**31),
)
def test_rounding_costs_at_most_half_a_step_of_each_input(name, kind, grouping, bits, spread, seed):
    """A step is the largest magnitude of a run of at most 64 inputs in one group, over 127."""
    group_size, groups = grouping
    weight = random_weight(kind, 30, groups, group_size, bits, seed)
    x = torch.randn(5, weight.shape[1], generator=generator(seed)) * 10 ** (spread * torch.rand(5, weight.shape[1]))
    dense = REFERENCE.pack([weight], [None])
    run = min(group_size, 64)
    steps = x.unflatten(1, (-1, run)).abs().amax(-1, keepdim=True).expand(-1, -1, run).flatten(1) / 127
    allowed = (steps / 2 * 1.0001) @ dense.weight.abs().T + 1e-5 * (x.abs() @ dense.weight.abs().T)
    assert ((BACKENDS[name, 1].pack([weight], [None])(x) - dense(x)).abs() <= allowed).all()


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("kind", [*KINDS, torch.bfloat16, torch.float16])
def test_a_rows_result_does_not_depend_on_its_neighbours(name, kind):
    weight = random_weight(kind, 50, 9, 64, 4, seed=3) if isinstance(kind, str) else torch.randn(50, 576).to(kind)
    linear = BACKENDS[name, 2].pack([weight], [None])
    x = torch.randn(70, 576, generator=generator(4))
    alone = torch.cat([linear(row[None]) for row in x])
    for count in (*range(2, 14), 15, 16, 17, 31, 32, 33, 40, 64, 70):
        assert torch.equal(linear(x[:count]), alone[:count]), f"{count} rows"


@pytest.mark.skipif("avx512_amx" not in INSTRUCTION_SETS, reason="this processor has no tile registers")
@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    out=st.integers(1, 70),
    grouping=st.sampled_from([(8, 5), (16, 16), (32, 8), (40, 3), (64, 3), (96, 2), (128, 5), (576, 1)]),
    bits=st.integers(2, 8),
    act_order=st.booleans(),
    tokens=st.integers(1, 70),
    seed=st.integers(0, 2**31),
)
def test_tile_registers_give_the_bits_that_vectors_give(kind, out, grouping, bits, act_order, tokens, seed):
    group_size, groups = grouping
    weight = random_weight(kind, out, groups, group_size, bits, seed, act_order=act_order)
    x = torch.randn(tokens, weight.shape[1], generator=generator(seed))
    results = [BACKENDS[name, 2].pack([weight], [None])(x) for name in ("avx512_amx", "avx512_vnni")]
    assert torch.equal(*results)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("bits", [4, 8])
def test_schemes_that_round_whole_rows_do_just_that(name, bits):
    """w8a8's rounding is a part of what the artifact means: the reference does it too, and no group is looked at."""
    weight = random_weight("symmetric", 70, 1, 576, bits, seed=5)
    weight = QuantizedTensor(weight.codes, weight.scales, None, None, bits, activations="int8")
    x = torch.randn(9, 576, generator=generator(6))
    x[-1] = 0
    theirs, ours = REFERENCE.pack([weight], [None])(x), BACKENDS[name, 2].pack([weight], [None])(x)
    # A value that lies on a boundary to seven digits may be rounded either way: one code of one input.
    one_code = x.abs().amax(1, keepdim=True) / 127 * REFERENCE.pack([weight], [None]).weight.abs().amax()
    assert ((ours - theirs).abs() <= one_code * 1.01 + 1e-5).all()
    assert (ours - theirs).abs().median() < 1e-5


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 2**-8), (torch.float16, 1e-6), (torch.float32, 2**-11)]
)
@pytest.mark.parametrize(("out", "width", "tokens"), [(40, 64, 1), (33, 63, 7), (16, 576, 20)])
def test_dense_weights(name, dtype, tolerance, out, width, tokens):
    """bfloat16 rounds activations to bfloat16 too; others are held in float16, or in bfloat16 where that is faster."""
    if width % 2 == 0 and BACKENDS[name, 2].multiplier.native_bfloat16:
        tolerance = 2**-7
    weight = torch.randn(out, width, generator=generator(7)).to(dtype)
    bias = torch.linspace(-1, 1, out)
    x = torch.randn(tokens, width, generator=generator(8))
    excess = (BACKENDS[name, 2].pack([weight], [bias])(x) - (x @ weight.float().T + bias)).abs()
    assert (excess <= tolerance * (x.abs() @ weight.float().abs().T + 1)).all()


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["symmetric", "mxfp4"])
def test_what_is_not_finite_is_not_hidden(name, bad, kind):
    linear = BACKENDS[name, 1].pack([random_weight(kind, 20, 2, 32, 4, seed=9)], [None])
    x = torch.randn(3, 64)
    x[1, 5] = bad
    result = linear(x)
    assert not result[1].isfinite().any()
    assert result[[0, 2]].isfinite().all()


@pytest.mark.parametrize(("largest", "dtype"), [(1.0, torch.float16), (1e5, torch.bfloat16)])
@pytest.mark.parametrize("kind", ["minimums", "two levels"])
def test_an_embedding_is_held_in_16_bits(kind, largest, dtype):
    """In float16 where that holds it, whether it comes in codes or in floating point."""
    table = random_weight(kind, 20, 4, 32, 4, seed=3)
    factor = largest / float(table.dequantize().abs().max())
    scales = (
        TwoLevel(table.scales.values, table.scales.factors.float() * factor)
        if kind == "two levels"
        else table.scales * factor
    )
    table = replace(table, scales=scales, minimums=None if table.minimums is None else table.minimums * factor)
    backend = BACKENDS[INSTRUCTION_SETS[0], 1]
    dense = table.dequantize()
    for one in (table, dense, dense.bfloat16()):
        held = backend.embedding(one)
        assert torch.equal(held, (dense if one is table else one).to(dtype))
        assert held.dtype == dtype


def fp4(**how) -> QuantizedTensor:
    return replace(random_weight("mxfp4", 8, 2, 16, 4, seed=1), **how)


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (fp4(minimums=torch.ones(8, 2)), "weights in fp4 have no kernel where their groups have minimums"),
        (fp4(activations="int8"), "weights in fp4 have no kernel for activations rounded to int8"),
        (fp4(number="fp8", bits=8), "weights in fp8 have a kernel only where each row has one scale"),
        (
            fp4(number="fp8", bits=8, scales=torch.ones(8, 1), activations="int8"),
            "weights in fp8 have no kernel for activations rounded to int8",
        ),
        (
            QuantizedTensor(torch.ones(8, 5, dtype=torch.uint8), torch.ones(8, 1), None, None, 8, number="fp8"),
            "weights in fp8 have a kernel only for an even number of inputs",
        ),
    ],
)
def test_a_weight_without_a_kernel_goes_to_the_reference_with_one_warning(weight, reason, caplog):
    backend = cpu_rounded.RoundedCpuBackend(1)
    x = torch.randn(2, weight.shape[1])
    for _ in range(2):
        assert torch.equal(backend.pack([weight], [None])(x), REFERENCE.pack([weight], [None])(x))
    assert [record.getMessage() for record in caplog.records] == [f"some operations run on plain torch: {reason}"]
