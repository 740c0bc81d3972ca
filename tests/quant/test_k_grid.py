"""The grids of GGUF's types: better than llama.cpp's, and sound where weights are not."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.quant.grid import grouped
from llmopt.quant.k_grid import fit_k_grid
from llmopt.weights.formats.gguf_blocks import block_type, decode_blocks, encode_blocks
from llmopt.weights.quantized import QuantizedTensor
from llmopt.weights.scheme import SCHEMES

# The squared errors, as a share of the weights' squares, of ggml's quantize_q4_0 and so on, of `weights()` and, second,
# weighted by `importance()`, which ggml was then given.
GGML_ERRORS = {
    "q4_0": (7.415e-3, 4.813e-3),
    "q4_1": (6.168e-3, 2.803e-3),
    "q5_0": (1.826e-3, 1.169e-3),
    "q5_1": (1.439e-3, 6.542e-4),
    "q8_0": (2.867e-5, 2.830e-5),
    "q4_k": (5.124e-3, 2.929e-3),
    "q5_k": (1.306e-3, 7.945e-4),
    "q6_k": (3.148e-4, 2.024e-4),
}


def weights() -> torch.Tensor:
    return torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))


def importance() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    torch.randn(256, 1024, generator=generator)
    return torch.exp(1.5 * torch.randn(1024, generator=generator))


def quantized(weight: torch.Tensor, name: str, importance: torch.Tensor | None = None) -> QuantizedTensor:
    scheme = SCHEMES[name]
    groups = grouped(weight, scheme)
    grid = fit_k_grid(groups, scheme, None if importance is None else importance.reshape(groups.shape[1:]))
    return grid.quantized(grid.numbers(groups).flatten(1))


def error(weight: torch.Tensor, made: QuantizedTensor, importance: torch.Tensor | float = 1.0) -> float:
    """The squared error as a share of the weights' squares."""
    return float(((made.dequantize() - weight).square() * importance).sum() / (weight.square() * importance).sum())


@pytest.mark.parametrize("name", GGML_ERRORS)
def test_errors_are_smaller_than_llama_cpps(name):
    weight, inputs = weights(), importance()
    plain, weighted = GGML_ERRORS[name]
    assert error(weight, quantized(weight, name)) < plain
    assert error(weight, quantized(weight, name, inputs), inputs) < weighted


@pytest.mark.parametrize("name", GGML_ERRORS)
def test_what_is_made_is_what_its_blocks_hold(name):
    made = quantized(weights()[:8], name)
    assert block_type(made) == SCHEMES[name].gguf_type
    back = decode_blocks(block_type(made), encode_blocks(made))
    assert torch.equal(back.dequantize(), made.dequantize())


@pytest.mark.parametrize("name", GGML_ERRORS)
def test_each_weight_takes_its_nearest_code(name):
    weight = weights()[:4]
    made = quantized(weight, name)
    least = error(weight, made)
    for step in (-1, 1):
        moved = replace(made, codes=(made.codes.int() + step).clamp(0, (1 << made.bits) - 1).to(torch.uint8))
        further = (moved.dequantize() - weight).abs() - (made.dequantize() - weight).abs()
        assert further.min() > -1e-6
        assert error(weight, moved) > least


@pytest.mark.parametrize("name", ["q4_1", "q5_1", "q4_k", "q5_k"])
def test_weights_on_a_grid_of_few_bits_come_back_on_it(name):
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (8, 16, 32), generator=generator).float()
    codes[..., :2] = torch.tensor([0.0, 15.0])
    weight = (codes * 0.25 - 2).flatten(1)
    assert error(weight, quantized(weight, name)) < 1e-6


EDGES = {
    "zeros": torch.zeros(2, 512),
    "equal": torch.full((2, 512), 0.37),
    "equal and negative": torch.full((2, 512), -0.37),
    "one that is not zero": torch.eye(2, 512) * 3,
    "large": torch.randn(2, 512, generator=torch.Generator().manual_seed(0)) * 1e4,
    "a block of zeros": torch.randn(2, 512, generator=torch.Generator().manual_seed(0)) * (torch.arange(512) > 255),
    "far from zero": torch.randn(2, 512, generator=torch.Generator().manual_seed(0)) * 0.01 + 5,
}


@pytest.mark.parametrize("name", GGML_ERRORS)
@pytest.mark.parametrize("edge", EDGES)
def test_odd_weights_come_out_near_what_they_are(name, edge):
    made = quantized(EDGES[edge], name)
    assert (made.dequantize() - EDGES[edge]).norm() <= 0.1 * EDGES[edge].norm()


@pytest.mark.parametrize("name", GGML_ERRORS)
@pytest.mark.parametrize("inputs", [torch.zeros(512), (torch.arange(512) > 300) * 1e-20], ids=["none", "few"])
def test_inputs_that_were_never_seen_leave_no_hole(name, inputs):
    weight = weights()[:2, :512]
    assert error(weight, quantized(weight, name, inputs)) < 0.1


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(list(GGML_ERRORS)),
    rows=st.integers(1, 5),
    blocks=st.integers(1, 3),
    size=st.floats(-3, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_and_size_of_weights(name, rows, blocks, size, seed):
    weight = torch.randn(rows, 256 * blocks, generator=torch.Generator().manual_seed(seed)) * 10**size
    made = quantized(weight, name)
    assert made.shape == weight.shape
    assert error(weight, made) < 0.02
