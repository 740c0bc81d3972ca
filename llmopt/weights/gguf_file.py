"""Reading a GGUF file's header, and its tensors as bytes. Imports no torch, so that a tokenizer can be read without it.

The layout is that of llama.cpp's `docs/gguf.md`, versions 2 and 3, little-endian. What the file says is never believed:
every count, length and offset is held against the file's size before anything is allocated or read.
"""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from llmopt.errors import InputError
from llmopt.weights.read_into import read_into

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4  # ggml's own limit
MAX_NESTING = 4  # arrays within arrays; nothing known nests even twice
LONGEST_MESSAGE = 300  # characters
STRING, ARRAY = 8, 9  # of the types of metadata, those of no fixed size

SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 10: "<u8", 11: "<i8",
    6: "<f4", 12: "<f8", 7: "?",
}  # fmt: skip
"""Number of a metadata type → numpy's name for it."""

SMALLEST = {STRING: 8, ARRAY: 12}
"""The fewest bytes that one value of a type without a fixed size takes: its length, or its type and length."""

TENSOR_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 22: ("IQ2_S", 256, 82), 18: ("IQ3_XXS", 256, 98),
    21: ("IQ3_S", 256, 110), 19: ("IQ1_S", 256, 50), 29: ("IQ1_M", 256, 56), 20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
"""Number of a tensor type → its name, the elements of a block, the bytes of a block."""


@dataclass(frozen=True)
class GGUFTensorInfo:
    """Where a tensor lies.

    Attributes:
        shape: as torch has it, the fastest dimension last (the file lists dimensions the other way round).
        type: ggml's name of the type, such as "Q4_0".
        offset: bytes from the start of the file.
        nbytes: its length there.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, that is of the last dimension."""
        return self.nbytes // prod(self.shape[:-1])


class GGUFFile:
    """A GGUF file whose header has been read. Its tensors are read when they are asked for.

    They are read rather than mapped: a page of a mapped file that was touched counts as this process's memory for as
    long as it is mapped, so that going through a model layer by layer would end with all of it resident.

    Attributes:
        path: where it is.
        metadata: every key with its value: int, float, bool, str, or a list of them.
        tensors: every tensor by its name, in the order of the file.
    """

    def __init__(self, path: str | Path) -> None:
        """Read the header. Raises InputError, one line with the path, for what is not a whole GGUF file."""
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror}") from None
        except ValueError:  # what mmap makes of a file of no bytes
            raise InputError(f"{self.path} is not a whole GGUF file: it is empty") from None
        try:
            header = _Header(mapped)
        except _Malformed as error:
            # Cut short, because a name out of a broken file can be as long as the file.
            raise InputError(f"{self.path} is not a whole GGUF file: {str(error)[:LONGEST_MESSAGE]}") from None
        self.metadata = header.metadata
        self.tensors = header.tensors
        parts = self.metadata.get("split.count", 1)
        if parts != 1:
            raise InputError(f"{self.path} is one of {parts} parts; join them first, with llama-gguf-split --merge")

    def info(self, name: str) -> GGUFTensorInfo:
        """The entry of a tensor. Raises InputError where there is none of that name."""
        if name not in self.tensors:
            raise InputError(f"{self.path} holds no tensor {name}")
        return self.tensors[name]

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor, uint8 [nbytes]."""
        content = np.empty(self.info(name).nbytes, np.uint8)
        self.read_into(name, content)
        return content

    def read_into(self, name: str, content: np.ndarray) -> None:
        """Read the bytes of a tensor into an array of as many. Raises InputError where the file has changed so that
        they are not there any more."""
        info = self.info(name)
        read_into(self.path, info.offset, content, name)


class _Malformed(Exception):
    """What is wrong with the file, in words that follow its path."""


class _Header:
    """Reads a header from its first byte to its last, keeping the place in `at`."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.size = len(data)
        self.at = 0
        tensor_count, metadata_count = self._preamble()
        self.metadata: dict[str, Any] = {}
        for _ in range(metadata_count):
            key = self.text()
            if key in self.metadata:
                raise _Malformed(f"the key {key!r} comes twice")
            self.metadata[key] = self.value(self.number("<u4"), nesting=0)
        entries = [self._tensor_entry() for _ in range(tensor_count)]
        self.tensors = self._place(entries)

    def take(self, nbytes: int) -> int:
        """Step over so many bytes; where they began."""
        start = self.at
        if nbytes > self.size - start:
            raise _Malformed(f"it ends at byte {self.size}, within what starts at byte {start}")
        self.at = start + nbytes
        return start

    def number(self, kind: str) -> Any:
        dtype = np.dtype(kind)
        return np.frombuffer(self.data, dtype, 1, self.take(dtype.itemsize))[0].item()

    def text(self) -> str:
        length = self.number("<u8")
        start = self.take(length)
        return _decoded(self.data[start : self.at], start)

    def value(self, kind: int, nesting: int) -> Any:
        """A value of metadata of a given type."""
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self._array(nesting + 1)
        if kind == 7:
            return self.number("<u1") != 0
        if kind not in SCALARS:
            raise _Malformed(f"unknown type {kind} of metadata before byte {self.at}")
        return self.number(SCALARS[kind])

    def _preamble(self) -> tuple[int, int]:
        """Magic and version; returns how many tensors and how many keys there are."""
        if self.data[:4] != MAGIC:
            raise _Malformed("it does not begin with the letters GGUF")
        self.at = 4
        version = self.number("<u4")
        if version and version & 0xFFFF == 0:
            raise _Malformed("it is big-endian, and only little-endian files can be read")
        if version not in (2, 3):
            raise _Malformed(f"its version is {version}, and versions 2 and 3 can be read")
        tensor_count, metadata_count = self.number("<u8"), self.number("<u8")
        self._check_count(tensor_count, 32, "tensors")
        self._check_count(metadata_count, 13, "keys")
        return tensor_count, metadata_count

    def _check_count(self, count: int, smallest: int, what: str) -> None:
        """Refuse a count that the rest of the file has no room for, before anything is made of it."""
        if count > (self.size - self.at) // smallest:
            raise _Malformed(f"it claims {count} {what}, more than it has room for")

    def _array(self, nesting: int) -> Any:
        if nesting > MAX_NESTING:
            raise _Malformed(f"arrays lie more than {MAX_NESTING} deep before byte {self.at}")
        kind, count = self.number("<u4"), self.number("<u8")
        if kind in SCALARS:
            dtype = np.dtype("u1" if kind == 7 else SCALARS[kind])
            self._check_count(count, dtype.itemsize, "numbers in an array")
            numbers = np.frombuffer(self.data, dtype, count, self.take(count * dtype.itemsize))
            return (numbers != 0 if kind == 7 else numbers).tolist()
        if kind not in SMALLEST:
            raise _Malformed(f"unknown type {kind} of array before byte {self.at}")
        self._check_count(count, SMALLEST[kind], "values in an array")
        return self._texts(count) if kind == STRING else [self._array(nesting + 1) for _ in range(count)]

    def _texts(self, count: int) -> list[str]:
        """`count` strings. Written out flat, because a vocabulary has some hundred thousand of them."""
        data, at, size = self.data, self.at, self.size
        length_at = struct.Struct("<Q").unpack_from
        texts = []
        for _ in range(count):
            if at + 8 > size:
                raise _Malformed(f"it ends at byte {size}, within a list of strings")
            start = at + 8
            at = start + length_at(data, at)[0]
            if at > size:
                raise _Malformed(f"it ends at byte {size}, within a string that starts at byte {start}")
            texts.append(_decoded(data[start:at], start))
        self.at = at
        return texts

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, number of the type, and offset within the data."""
        name = self.text()
        dimensions = self.number("<u4")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise _Malformed(f"tensor {name!r} has {dimensions} dimensions, not 1 to {MAX_DIMENSIONS}")
        shape = tuple(self.number("<u8") for _ in range(dimensions))[::-1]
        return name, shape, self.number("<u4"), self.number("<u8")

    def _place(self, entries: list[tuple[str, tuple[int, ...], int, int]]) -> dict[str, GGUFTensorInfo]:
        """Find where the tensors lie: their data begins at the first aligned byte after the header."""
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise _Malformed(f"its alignment is {alignment!r}, not a power of two")
        data_start = -(-self.at // alignment) * alignment
        tensors: dict[str, GGUFTensorInfo] = {}
        for name, shape, number, offset in entries:
            if name in tensors:
                raise _Malformed(f"the tensor {name!r} comes twice")
            if offset % alignment:
                raise _Malformed(f"tensor {name!r} begins at {offset}, which is not a multiple of {alignment}")
            type_name, nbytes = _measure(name, shape, number)
            if data_start + offset + nbytes > self.size:
                end = data_start + offset + nbytes
                raise _Malformed(f"tensor {name!r} would end at byte {end}, and the file ends at {self.size}")
            tensors[name] = GGUFTensorInfo(name, shape, type_name, data_start + offset, nbytes)
        return tensors


def _decoded(text: bytes, at: int) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise _Malformed(f"the string at byte {at} is not UTF-8") from None


def _measure(name: str, shape: tuple[int, ...], number: int) -> tuple[str, int]:
    """The name of a tensor's type, and its bytes."""
    if number not in TENSOR_TYPES:
        raise _Malformed(f"tensor {name!r} is of the unknown type {number}")
    type_name, block, block_bytes = TENSOR_TYPES[number]
    if 0 in shape:
        raise _Malformed(f"tensor {name!r} has a dimension of 0")
    if shape[-1] % block:
        raise _Malformed(f"tensor {name!r} has rows of {shape[-1]}, which {type_name} blocks of {block} do not divide")
    return type_name, prod(shape) // block * block_bytes
