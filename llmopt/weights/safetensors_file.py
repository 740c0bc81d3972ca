"""Reading a safetensors file, tensor by tensor.

The file begins with the length of its header, 8 bytes, and the header, JSON: for each tensor its dtype, its shape and
where in the rest of the file it lies. The tensors lie end to end (github.com/huggingface/safetensors).

The library's own reader maps the file. A page of it that was touched then counts as this process's memory for as long
as the file is open, so that going through a model layer by layer would end with all of it resident; and a file that is
cut short meanwhile kills the process.
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmopt.errors import InputError
from llmopt.weights.read_into import read_into

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""safetensors' name of a dtype → torch's."""

METADATA = "__metadata__"
LONGEST_HEADER = 100_000_000  # bytes; the library's own limit


@dataclass(frozen=True)
class TensorPlace:
    """A tensor's entry in the header; `start` counts from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class SafetensorsFile:
    """A file whose header has been read; its tensors are read when they are asked for.

    Attributes:
        path: where it is.
        metadata: what the file says of itself.
        tensors: every tensor by its name.
    """

    def __init__(self, path: Path) -> None:
        """Raises InputError, one line with the path, for what is not a whole safetensors file. What the header says
        is held against the file's size before anything is made of it."""
        self.path = path
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(0)
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(size - 8, LONGEST_HEADER):
                    raise _Malformed(f"of its {size} bytes, {length} would be the header")
                header = _parse(file.read(length))
            self.metadata = _metadata(header.pop(METADATA, {}))
            self.tensors = {name: _place(name, entry, 8 + length) for name, entry in header.items()}
            _check_end_to_end(self.tensors, 8 + length, size)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
        except _Malformed as error:
            raise InputError(f"{path} is not a whole safetensors file: {str(error)[:300]}") from None

    def dtype(self, name: str) -> torch.dtype:
        stored = self.tensors[name].dtype
        if stored not in DTYPES:
            raise InputError(f"{self.path}: {name} is {stored}, which is not known here")
        return DTYPES[stored]

    def load(self, name: str) -> Tensor:
        """A tensor on the CPU, in the dtype it is stored in. Raises InputError for a dtype that torch does not have,
        and where the file has been cut short meanwhile."""
        place, dtype = self.tensors[name], self.dtype(name)
        content = torch.empty(place.nbytes, dtype=torch.uint8)
        read_into(self.path, place.start, content.numpy(), name)
        return content.view(dtype).view(place.shape)


class _Malformed(Exception):
    """What is wrong with the file, in words that follow its path."""


def _parse(header: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise _Malformed(f"its header is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise _Malformed("its header is not an object of tensors")
    return parsed


def _metadata(given: Any) -> dict[str, str]:
    if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
        raise _Malformed("its metadata are not texts by name")
    return given


def _place(name: str, entry: Any, data_start: int) -> TensorPlace:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(stop)]}:
            # True is an int to Python, and JSON's numbers may be negative.
            if all(type(number) is int and number >= 0 for number in (*shape, start, stop)) and start <= stop:
                _check_size(name, dtype, shape, stop - start)
                return TensorPlace(dtype, tuple(shape), data_start + start, stop - start)
    raise _Malformed(f"the entry of tensor {name!r} is not a dtype, a shape and two offsets")


def _check_size(name: str, dtype: str, shape: list[int], nbytes: int) -> None:
    """Of a dtype that is not known here the size is not known either; such a tensor can only be passed over."""
    if dtype in DTYPES and prod(shape) * DTYPES[dtype].itemsize != nbytes:
        raise _Malformed(f"tensor {name!r} has {nbytes} bytes, and {dtype} {shape} would have others")


def _check_end_to_end(tensors: dict[str, TensorPlace], data_start: int, size: int) -> None:
    """Every byte after the header belongs to one tensor, as the format asks."""
    at = data_start
    for name, place in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if place.start != at:
            raise _Malformed(f"tensor {name!r} begins at byte {place.start}, where {at} is next")
        at += place.nbytes
    if at != size:
        raise _Malformed(f"its tensors end at byte {at}, and the file ends at {size}")
