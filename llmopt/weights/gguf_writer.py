"""Writing a GGUF file, version 3, little-endian: first the header with every tensor's place, then tensor by tensor."""

import struct
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from llmopt.errors import LlmoptError
from llmopt.weights.gguf_file import (
    ARRAY,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_DIMENSIONS,
    SCALARS,
    STRING,
    TENSOR_TYPES,
    GGUFTensorInfo,
)

VERSION = 3
TYPE_NUMBERS = {name: number for number, (name, _, _) in TENSOR_TYPES.items()}
NUMBER_TYPES = {np.dtype(dtype): number for number, dtype in SCALARS.items()}
STORED_AS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtype a tensor of these types is given in; all others are given as bytes, uint8."""


class GGUFWriter:
    """Writes one file whose tensors are known beforehand, and given one at a time in that order.

    Attributes:
        tensors: every tensor by name with its place in the file.
    """

    def __init__(
        self, file: BinaryIO, metadata: Mapping[str, Any], tensors: Sequence[tuple[str, tuple[int, ...], str]]
    ) -> None:
        """Write the header.

        Args:
            file: open for writing, at its start.
            metadata: keys and values. A str, a bool, and a numpy number or array are written as what they are; an int
                as uint32, where it does not fit as int32, int64 or uint64; a float as float32; a list likewise by
                its members, but ints as int32, which is what llama.cpp reads token types as.
            tensors: name, shape as torch has it, and ggml's name of the type.

        Raises LlmoptError for rows that the blocks of a type do not divide, and ValueError for a value, type or name
        that GGUF cannot have.
        """
        if "general.alignment" in metadata:
            raise ValueError("the alignment is always 32, and is not for the metadata to say")
        self._file = file
        header = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
        for key, value in metadata.items():
            kind, content = _typed(key, value)
            header += [_text(key), struct.pack("<I", kind), content]
        offset = 0
        places: dict[str, tuple[tuple[int, ...], str, int, int]] = {}
        for name, shape, kind_name in tensors:
            if name in places:
                raise ValueError(f"the tensor {name} is listed twice")
            nbytes = _nbytes(name, shape, kind_name)
            places[name] = (shape, kind_name, offset, nbytes)
            dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
            header += [_text(name), dimensions, struct.pack("<IQ", TYPE_NUMBERS[kind_name], offset)]
            offset = _aligned(offset + nbytes)
        content = b"".join(header)
        start = _aligned(len(content))
        file.write(content.ljust(start, b"\0"))
        self.tensors = {
            name: GGUFTensorInfo(name, shape, kind_name, start + offset, nbytes)
            for name, (shape, kind_name, offset, nbytes) in places.items()
        }
        self._awaited = list(self.tensors.values())[::-1]

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor: float32, float16 or bfloat16 for those types, else its blocks as uint8, of any shape.

        Raises ValueError where it is not the one that is next, or not what the header says of it.
        """
        if not self._awaited or self._awaited[-1].name != name:
            expected = self._awaited[-1].name if self._awaited else "none"
            raise ValueError(f"{name} was given where {expected} is next")
        info = self._awaited[-1]
        dtype = STORED_AS.get(info.type, torch.uint8)
        if tensor.dtype != dtype or tensor.nbytes != info.nbytes:
            raise ValueError(
                f"{name} is {tensor.nbytes} bytes of {tensor.dtype}, and {info.type} has {info.nbytes} of {dtype}"
            )
        self._awaited.pop()
        self._file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        self._file.write(bytes(_aligned(info.nbytes) - info.nbytes))

    def finish(self) -> None:
        """Raises ValueError where a tensor that the header lists was not given."""
        if self._awaited:
            raise ValueError(f"{len(self._awaited)} tensors were not given, first {self._awaited[-1].name}")


def _aligned(offset: int) -> int:
    return -(-offset // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _nbytes(name: str, shape: tuple[int, ...], kind_name: str) -> int:
    """The bytes of a tensor, whose rows must be whole blocks."""
    if kind_name not in TYPE_NUMBERS:
        raise ValueError(f"{kind_name} is not a type of ggml's")
    if not 1 <= len(shape) <= MAX_DIMENSIONS or 0 in shape:
        raise ValueError(f"{name} is {list(shape)}, and GGUF has 1 to {MAX_DIMENSIONS} dimensions, none of them 0")
    _, block, block_bytes = TENSOR_TYPES[TYPE_NUMBERS[kind_name]]
    if shape[-1] % block:
        raise LlmoptError(f"{name} has rows of {shape[-1]}, which {kind_name}'s blocks of {block} do not divide")
    return prod(shape) // block * block_bytes


def _typed(key: str, value: Any) -> tuple[int, bytes]:
    """A value's type in metadata and its bytes."""
    if isinstance(value, str):
        return STRING, _text(value)
    if isinstance(value, list | tuple | np.ndarray) and np.ndim(value) == 1:
        return ARRAY, _array(key, value)
    number = _number(value, np.uint32)
    if number is None or number.ndim:
        raise ValueError(f"{key} is {type(value).__name__}, which GGUF's metadata cannot hold")
    return NUMBER_TYPES[number.dtype], number.tobytes()


def _array(key: str, values: Sequence[Any] | np.ndarray) -> bytes:
    """Type of the members, how many, and the members. A list of nothing counts as one of strings."""
    if all(isinstance(member, str) for member in values):
        return struct.pack("<IQ", STRING, len(values)) + b"".join(map(_text, values))
    numbers = _number(values, np.int32)
    if numbers is None:
        raise ValueError(f"{key} is a list of members that GGUF's metadata cannot hold together")
    return struct.pack("<IQ", NUMBER_TYPES[numbers.dtype], len(values)) + numbers.tobytes()


def _number(value: Any, integers: type[np.integer]) -> np.ndarray | None:
    """Python's numbers in the dtype that GGUF gives them, numpy's in their own; None for what is no number."""
    given = np.asarray(value)
    if isinstance(value, np.ndarray | np.generic):
        return given if given.dtype in NUMBER_TYPES else None
    if given.dtype == np.float64:
        return given.astype(np.float32)
    if given.dtype.kind in "iu":
        for dtype in (integers, np.int32, np.int64, np.uint64):
            if np.array_equal(given.astype(dtype), given):
                return given.astype(dtype)
    return given if given.dtype == np.bool_ else None
