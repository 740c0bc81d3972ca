"""FP8 weights, with activations rounded to FP8 or to bfloat16, on every instruction set that this processor has."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.backend.reference import ReferenceBackend
from llmopt.weights.quantized import QuantizedTensor

_cpu = pytest.importorskip("llmopt.kernels._cpu", reason="the compiled kernels are not built")
cpu_rounded = pytest.importorskip("llmopt.backend.cpu_rounded")

INSTRUCTION_SETS = _cpu.instruction_sets()
BACKENDS = {
    (name, threads): cpu_rounded.RoundedCpuBackend(threads, name) for name in INSTRUCTION_SETS for threads in (1, 2)
}
REFERENCE = ReferenceBackend()
ONE = 0x38  # the code of 1
CODES = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)  # all but NaN


def fp8(codes: torch.Tensor, activations: str | None, scales: torch.Tensor | None = None) -> QuantizedTensor:
    scales = torch.ones(len(codes), 1) if scales is None else scales
    return QuantizedTensor(codes, scales, None, None, 8, activations, "fp8")


def random_weight(out: int, width: int, activations: str | None, seed: int) -> QuantizedTensor:
    source = torch.Generator().manual_seed(seed)
    codes = CODES[torch.randint(len(CODES), (out, width), generator=source)]
    return fp8(codes, activations, 0.01 + torch.rand(out, 1, generator=source))


def random_rows(tokens: int, width: int, seed: int) -> torch.Tensor:
    """Numbers in bfloat16, of magnitudes that differ between rows and within them; every third row is zeros."""
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=source)
    x *= 10 ** (4 * torch.rand(tokens, width, generator=source) - 2)
    x *= 10 ** (8 * torch.rand(tokens, 1, generator=source) - 4)
    x[2::3] = 0
    return x.bfloat16().float()


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@settings(max_examples=60, deadline=None)
@given(
    activations=st.sampled_from([None, "fp8"]),
    out=st.integers(1, 100),
    width=st.integers(1, 150).map(lambda half: 2 * half),
    biased=st.booleans(),
    tokens=st.integers(1, 70),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**31),
)
def test_the_product_is_the_references(name, activations, out, width, biased, tokens, threads, seed):
    """It rounds activations as the reference does, so that what is left is the order of additions."""
    weight = random_weight(out, width, activations, seed)
    bias = torch.linspace(-1, 1, out) if biased else None
    x = random_rows(tokens, width, seed)
    exact = REFERENCE.pack([weight], [bias])
    excess = (BACKENDS[name, threads].pack([weight], [bias])(x) - exact(x)).abs()
    assert (excess <= 1e-5 * (1.1 * x.abs() @ exact.weight.abs().T + (1 if biased else 0))).all()


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("tokens", [1, 254])
def test_every_number_of_a_weight(name, tokens):
    weight = fp8(CODES[None].expand(20, -1), None, torch.rand(20, 1))
    picked = BACKENDS[name, 2].pack([weight], [None])(torch.eye(len(CODES))[-tokens:])
    assert torch.equal(picked, weight.dequantize().T[-tokens:])


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_activations_are_rounded_to_the_bit_as_the_reference_rounds_them(name):
    """Seen through an identity matrix. With 448 in a row its scale is 1, so that ties are met too."""
    ties = torch.cat([torch.arange(0, 64) / 1024, torch.arange(64, 511) / 16])
    rows = torch.randn(40, 512, generator=torch.Generator().manual_seed(1)) * torch.logspace(-45, 30, 40)[:, None]
    for row, sign in enumerate((1, -1)):
        rows[row, :511], rows[row, 511] = sign * ties, 448
    rows[2], rows[3, 7], rows[4, 0], rows[5] = 0, float("nan"), float("inf"), 1e-44
    weight = fp8(ONE * torch.eye(512).to(torch.uint8), "fp8")
    found, expected = (backend.pack([weight], [None])(rows) for backend in (BACKENDS[name, 2], REFERENCE))
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("activations", [None, "fp8"])
def test_a_rows_result_does_not_depend_on_its_neighbours(name, activations):
    linear = BACKENDS[name, 2].pack([random_weight(50, 576, activations, seed=3)], [None])
    x = torch.randn(70, 576, generator=torch.Generator().manual_seed(4))
    alone = torch.cat([linear(row[None]) for row in x])
    for count in (*range(2, 14), 15, 16, 17, 31, 32, 33, 40, 64, 70):
        assert torch.equal(linear(x[:count]), alone[:count]), f"{count} rows"


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("activations", [None, "fp8"])
def test_what_is_not_finite_is_not_hidden(name, bad, activations):
    linear = BACKENDS[name, 1].pack([fp8(torch.full((20, 64), ONE, dtype=torch.uint8), activations)], [None])
    x = torch.randn(3, 64)
    x[1, 5] = bad
    result = linear(x)
    assert not result[1].isfinite().any()
    assert result[[0, 2]].isfinite().all()


def test_a_weight_that_is_not_finite_is_refused():
    codes = torch.full((4, 8), ONE, dtype=torch.uint8)
    codes[3, 7] = 0xFF
    with pytest.raises(ValueError, match="FP8 weights must be finite"):
        BACKENDS[INSTRUCTION_SETS[0], 1].pack([fp8(codes, None)], [None])
