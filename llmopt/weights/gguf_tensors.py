"""A GGUF file's tensors as torch tensors and integer codes."""

import gguf
import numpy as np
import torch
from torch import Tensor

from llmopt.errors import InputError
from llmopt.weights.formats.gguf_blocks import BLOCK_TYPES, decode_blocks
from llmopt.weights.gguf_file import GGUFFile
from llmopt.weights.quantized import Weight

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CHUNK_BYTES = 1 << 20  # decoded at a time: gguf's decoders need some twenty times that for intermediate values


def load(file: GGUFFile, name: str) -> Weight:
    """A tensor as it is stored, where that can be kept.

    Returns: a QuantizedTensor for a matrix in one of `BLOCK_TYPES`; a Tensor of its own dtype for float32, float16
    and bfloat16; for other types and shapes the decoded values, float32. Raises InputError for a missing tensor and
    for a type that cannot be decoded.
    """
    info = file.info(name)
    if info.type in BLOCK_TYPES and len(info.shape) == 2:
        return decode_blocks(info.type, _read(file, name).view(info.shape[0], -1))
    if info.type in FLOATS:
        return _read(file, name).view(FLOATS[info.type]).view(info.shape)
    return dense(file, name)


def dense(file: GGUFFile, name: str) -> Tensor:
    """A tensor's values, float32 of its shape, whatever it is stored as. Raises InputError as `load` does."""
    info = file.info(name)
    if info.type in FLOATS:
        return _read(file, name).view(FLOATS[info.type]).view(info.shape).float()
    rows = file.raw(name).reshape(-1, info.row_bytes)
    values = np.empty((rows.shape[0], info.shape[-1]), np.float32)
    step = max(1, CHUNK_BYTES // info.row_bytes)
    try:
        for start in range(0, len(rows), step):
            values[start : start + step] = gguf.dequantize(
                rows[start : start + step], gguf.GGMLQuantizationType[info.type]
            )
    except NotImplementedError:  # gguf's answer to a type that it has no decoder for
        raise InputError(f"{file.path}: tensor {name} is {info.type}, which cannot be decoded") from None
    return torch.from_numpy(values).view(info.shape)


def _read(file: GGUFFile, name: str) -> Tensor:
    """The bytes of a tensor, uint8, in memory of torch's own, whose alignment does not change from run to run."""
    content = torch.empty(file.info(name).nbytes, dtype=torch.uint8)
    file.read_into(name, content.numpy())
    return content
