"""GGUF's simplest block types, Q8_0 and Q4_0, to and from integer codes, bit for bit as ggml lays them out.

A row is cut into blocks of 32. A block is a float16 scale and then its values: for Q8_0 32 signed bytes; for Q4_0 16
bytes, whose low nibbles are values 0 to 15 and whose high nibbles are values 16 to 31, each 8 above what it means.
"""

import torch
from torch import Tensor

from llmopt.errors import LlmoptError
from llmopt.weights.formats.base import to_float16
from llmopt.weights.quantized import QuantizedTensor

BLOCK = 32
SCALE_BYTES = 2
CODE_BITS = {"Q8_0": 8, "Q4_0": 4}
"""ggml's names of the block types that stay integer codes here, and the width of a code."""


def block_type(weight: QuantizedTensor) -> str:
    """The block type that holds this tensor as it is. Raises LlmoptError where neither does."""
    plain = weight.plain_order()
    for name, bits in CODE_BITS.items():
        if plain.bits == bits and plain.zeros is None and plain.group_index is None and plain.group_size == BLOCK:
            return name
    raise LlmoptError(
        f"GGUF's Q8_0 and Q4_0 hold symmetric codes of 8 and 4 bits in groups of {BLOCK} in plain order, not "
        f"{weight.bits} bits in groups of {weight.group_size}"
    )


def encode_blocks(weight: QuantizedTensor) -> Tensor:
    """The blocks of a tensor that `block_type` accepts, uint8 [out, bytes of a row].

    Raises LlmoptError for another tensor and for a scale that float16 cannot hold.
    """
    kind = block_type(weight)
    codes = weight.codes.unflatten(1, (-1, BLOCK))
    scales = to_float16(weight.scales, "GGUF blocks")[..., None].view(torch.uint8)
    halves = codes[..., : BLOCK // 2], codes[..., BLOCK // 2 :]
    values = codes ^ 0x80 if kind == "Q8_0" else halves[0] | halves[1] << 4  # ^ 0x80 takes 128 from a byte
    return torch.cat((scales, values), dim=2).flatten(1)


def decode_blocks(kind: str, blocks: Tensor) -> QuantizedTensor:
    """The codes in blocks of type `kind`, "Q8_0" or "Q4_0", given as uint8 [out, bytes of a row]."""
    bits = CODE_BITS[kind]
    grouped = blocks.unflatten(1, (-1, SCALE_BYTES + BLOCK * bits // 8))
    scales = grouped[..., :SCALE_BYTES].contiguous().view(torch.float16).squeeze(2)
    values = grouped[..., SCALE_BYTES:]
    codes = values ^ 0x80 if kind == "Q8_0" else torch.cat((values & 0xF, values >> 4), dim=2)
    return QuantizedTensor(codes.flatten(1), scales, zeros=None, group_index=None, bits=bits)
