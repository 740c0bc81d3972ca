"""Blocks are what the gguf package writes and reads, bit for bit."""

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.errors import LlmoptError
from llmopt.weights.formats.gguf_blocks import block_type, decode_blocks, encode_blocks
from llmopt.weights.quantized import QuantizedTensor

KINDS = {"Q8_0": 8, "Q4_0": 4}


def tensor(kind: str, rows: int, blocks: int, seed: int) -> QuantizedTensor:
    """Random codes, the lowest and highest among them, and scales of either sign, as Q4_0 has them."""
    generator = torch.Generator().manual_seed(seed)
    bits = KINDS[kind]
    codes = torch.randint(0, 1 << bits, (rows, blocks * 32), generator=generator, dtype=torch.uint8)
    codes[0, :2] = torch.tensor([0, (1 << bits) - 1])
    scales = torch.randn(rows, blocks, generator=generator).half()
    return QuantizedTensor(codes, scales, None, None, bits)


tensors = st.builds(
    tensor, st.sampled_from(list(KINDS)), st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**32 - 1)
)


@settings(max_examples=60, deadline=None)
@given(tensors)
def test_round_trip(weight):
    back = decode_blocks(block_type(weight), encode_blocks(weight))
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.scales, weight.scales)
    assert (back.bits, back.zeros, back.group_index) == (weight.bits, None, None)


@settings(max_examples=60, deadline=None)
@given(tensors)
def test_the_gguf_package_decodes_the_same_values(weight):
    blocks = encode_blocks(weight).numpy()
    theirs = gguf.dequantize(blocks, gguf.GGMLQuantizationType[block_type(weight)])
    assert np.array_equal(theirs, weight.dequantize().numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_the_gguf_package_come_back_bit_for_bit(kind):
    values = np.random.default_rng(1).standard_normal((7, 96)).astype(np.float32)
    blocks = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
    weight = decode_blocks(kind, torch.from_numpy(blocks))
    assert np.array_equal(encode_blocks(weight).numpy(), blocks)
    assert np.array_equal(weight.dequantize().numpy(), gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind]))


def test_a_group_index_that_says_nothing_is_no_obstacle():
    weight = tensor("Q4_0", 2, 2, 0)
    indexed = replace(weight, group_index=(torch.arange(64) // 32).int())
    assert torch.equal(encode_blocks(indexed), encode_blocks(weight))


@pytest.mark.parametrize(
    "change",
    [
        {"zeros": torch.full((2, 2), 7, dtype=torch.uint8)},
        {"group_index": torch.arange(64).int() % 2},
        {"bits": 3},
        {"scales": torch.ones(2, 1)},
    ],
    ids=["zero points", "group index", "width", "group size"],
)
def test_what_blocks_cannot_hold_is_refused(change):
    with pytest.raises(LlmoptError, match="GGUF's Q8_0 and Q4_0 hold symmetric codes"):
        encode_blocks(replace(tensor("Q4_0", 2, 2, 0), **change))


@pytest.mark.parametrize("bad", [70000.0, float("nan"), float("-inf")])
def test_a_scale_that_float16_cannot_hold_is_refused(bad):
    weight = tensor("Q8_0", 2, 2, 0)
    scales = weight.scales.float()
    scales[1, 1] = bad
    with pytest.raises(LlmoptError, match="float16"):
        encode_blocks(replace(weight, scales=scales))
