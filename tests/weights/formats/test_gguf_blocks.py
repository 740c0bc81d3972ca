"""Blocks are what the gguf package writes and reads, bit for bit."""

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.errors import LlmoptError
from llmopt.weights.formats.gguf_blocks import BLOCK_TYPES, block_type, decode_blocks, encode_blocks
from llmopt.weights.quantized import QuantizedTensor, TwoLevel

WRITTEN_BY_GGUF = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")


def random_blocks(kind: str, rows: int, count: int, seed: int) -> torch.Tensor:
    """Any bytes, but that scales and minimums are finite."""
    layout = BLOCK_TYPES[kind]
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (rows, count, sum(layout.sizes)), generator=generator, dtype=torch.uint8)
    for field, part in zip(layout.fields, blocks.split(layout.sizes, dim=2), strict=True):
        if field in ("scale", "minimum"):
            part[..., 1] &= 0xBB  # no exponent of all ones
        elif field == "power":
            part.clamp_(max=250)
    return blocks.flatten(1)


def weight_of(kind: str, rows: int = 2, count: int = 2, seed: int = 0) -> QuantizedTensor:
    return decode_blocks(kind, random_blocks(kind, rows, count, seed))


def ggml(kind: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[kind]


sizes = {"rows": st.integers(1, 9), "count": st.integers(1, 4), "seed": st.integers(0, 2**32 - 1)}
kinds = st.sampled_from(list(BLOCK_TYPES))


@settings(max_examples=150, deadline=None)
@given(kind=kinds, **sizes)
def test_any_blocks_decode_as_the_gguf_package_does_and_come_back(kind, rows, count, seed):
    blocks = random_blocks(kind, rows, count, seed)
    weight = decode_blocks(kind, blocks)
    assert np.array_equal(weight.dequantize().numpy(), gguf.dequantize(blocks.numpy(), ggml(kind)))
    assert block_type(weight) == kind
    assert torch.equal(encode_blocks(weight), blocks)


def test_the_bytes_of_a_block_are_ggmls():
    for kind, layout in BLOCK_TYPES.items():
        assert (layout.block, sum(layout.sizes)) == gguf.GGML_QUANT_SIZES[ggml(kind)]


@pytest.mark.parametrize("kind", WRITTEN_BY_GGUF)
def test_blocks_of_the_gguf_package_come_back_bit_for_bit(kind):
    values = np.random.default_rng(1).standard_normal((7, 96)).astype(np.float32)
    blocks = gguf.quantize(values, ggml(kind))
    weight = decode_blocks(kind, torch.from_numpy(blocks))
    assert np.array_equal(encode_blocks(weight).numpy(), blocks)
    assert np.abs(weight.dequantize().numpy() - values).max() < 1


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_rows_are_selected_without_dequantizing_the_others(kind):
    weight, rows = weight_of(kind, rows=5), torch.tensor([4, 0, 4])
    assert torch.equal(weight.select_rows(rows).dequantize(), weight.dequantize()[rows])


def test_a_group_index_that_says_nothing_is_no_obstacle():
    weight = weight_of("Q4_0")
    indexed = replace(weight, group_index=(torch.arange(64) // 32).int())
    assert torch.equal(encode_blocks(indexed), encode_blocks(weight))


def test_factors_for_all_rows_are_written_for_each():
    weight = weight_of("Q6_K", rows=3)
    shared = TwoLevel(weight.scales.values, torch.ones(1, 2))
    back = decode_blocks("Q6_K", encode_blocks(replace(weight, scales=shared)))
    assert torch.equal(back.scales.float(), shared.float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zeros": torch.full((2, 2), 7, dtype=torch.uint8)}, "4-bit int codes with zero points"),
        ({"group_index": torch.arange(64).int() % 2}, "in an order of their own"),
        ({"bits": 3}, "no block type for 3-bit"),
        ({"scales": torch.ones(2, 1)}, "in groups of 64"),
        ({"scales": TwoLevel(torch.ones(2, 2), torch.ones(2, 1))}, "no block type"),
        ({"number": "fp8"}, "fp8"),
        ({"number": "fp4", "scales": torch.full((2, 2), 3.0)}, "powers of two"),
    ],
    ids=["zero points", "group index", "width", "group size", "two levels", "number", "powers"],
)
def test_what_blocks_cannot_hold_is_refused(change, message):
    with pytest.raises(LlmoptError, match=message):
        encode_blocks(replace(weight_of("Q4_0"), **change))


def test_a_super_block_cut_short_is_refused():
    weight = weight_of("Q6_K")
    half = QuantizedTensor(
        weight.codes[:, :384], TwoLevel(weight.scales.values[:, :24], torch.ones(2, 1)), None, None, 6
    )
    with pytest.raises(LlmoptError, match="rows of 384"):
        encode_blocks(half)


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q6_K"])
@pytest.mark.parametrize("bad", [70000.0, float("nan"), float("-inf")])
def test_a_scale_that_float16_cannot_hold_is_refused(kind, bad):
    weight = weight_of(kind)
    scales = weight.scales.factors if isinstance(weight.scales, TwoLevel) else weight.scales
    scales = scales.float()
    scales[1, 1] = bad
    if isinstance(weight.scales, TwoLevel):
        scales = TwoLevel(weight.scales.values, scales)
    with pytest.raises(LlmoptError, match="float16"):
        encode_blocks(replace(weight, scales=scales))


@pytest.mark.parametrize(
    ("kind", "part", "number"), [("Q4_K", "scales", 64), ("Q2_K", "minimums", 16), ("Q3_K", "scales", 40)]
)
def test_a_group_scale_of_too_many_bits_is_refused(kind, part, number):
    weight = weight_of(kind)
    getattr(weight, part).values[0, 3] = number
    with pytest.raises(LlmoptError, match=f"{number} do not fit"):
        encode_blocks(weight)
