"""The header reader on whole files, and on files that are broken or mean harm."""

import io
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.errors import InputError
from llmopt.weights.gguf_file import GGUFFile, GGUFTensorInfo
from llmopt.weights.gguf_writer import GGUFWriter

METADATA = {
    "general.architecture": "llama",
    "general.alignment_is_not_here": False,
    "llama.block_count": 2,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.tokens": ["a", "b", "ab", "ü"],
    "tokenizer.ggml.scores": [0.0, -1.0, -2.0, -3.0],
    "tokenizer.ggml.token_type": [1, 1, 3, 1],
}
TENSORS = [("norm", (4,), "F32"), ("up", (3, 32), "Q8_0"), ("experts", (2, 3, 32), "Q4_0")]


def whole_file() -> bytes:
    file = io.BytesIO()
    writer = GGUFWriter(file, METADATA, TENSORS)
    writer.add("norm", torch.ones(4))
    writer.add("up", torch.arange(102, dtype=torch.uint8))
    writer.add("experts", torch.arange(108, dtype=torch.uint8))
    writer.finish()
    return file.getvalue()


WHOLE = whole_file()


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def key(name: bytes, kind: int, content: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + content


def entry(name: bytes = b"t", shape=(2,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def header(keys=(), entries=(), version: int = 3, tensors: int | None = None, count: int | None = None) -> bytes:
    """A file by hand, with 64 bytes of data after the header."""
    counts = (len(entries) if tensors is None else tensors, len(keys) if count is None else count)
    content = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(entries)
    return content.ljust(-(-len(content) // 32) * 32, b"\0") + bytes(64)


def read(path: Path, content: bytes) -> GGUFFile:
    path.write_bytes(content)
    return GGUFFile(path)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """One file that hypothesis may write over and over."""
    return tmp_path_factory.mktemp("gguf") / "model.gguf"


def test_reads_metadata_and_tensors(path):
    file = read(path, WHOLE)
    assert file.path == path
    assert file.metadata == METADATA
    assert list(file.tensors) == ["norm", "up", "experts"]
    assert file.info("up").shape == (3, 32)
    assert file.info("up").nbytes == 3 * 34
    assert file.info("up").row_bytes == 34
    assert file.info("experts").row_bytes == 18
    assert np.array_equal(file.raw("up"), np.arange(102, dtype=np.uint8))


@pytest.mark.parametrize("version", [2, 3])
def test_reads_both_versions_and_nested_arrays_and_other_alignments(path, version):
    inner = struct.pack("<IQ2h", 3, 2, -1, 5)
    keys = [
        key(b"nested", 9, struct.pack("<IQ", 9, 2) + inner + inner),
        key(b"general.alignment", 4, struct.pack("<I", 8)),
        key(b"flags", 9, struct.pack("<IQ3B", 7, 3, 0, 1, 2)),
        key(b"double", 12, struct.pack("<d", 0.1)),
        key(b"long", 11, struct.pack("<q", -(2**40))),
    ]
    file = read(path, header(keys, [entry(offset=8)], version))
    assert file.metadata == {
        "nested": [[-1, 5], [-1, 5]], "general.alignment": 8, "flags": [False, True, True], "double": 0.1,
        "long": -(2**40),
    }  # fmt: skip
    assert file.info("t") == GGUFTensorInfo("t", (2,), "F32", file.info("t").offset, 8)
    assert file.info("t").offset % 8 == 0


def test_a_file_that_is_cut_short_or_taken_away_after_it_was_opened_is_said(path):
    file = read(path, WHOLE)
    path.write_bytes(WHOLE[:-60])
    assert file.raw("norm").nbytes == 16
    with pytest.raises(InputError, match="cut short since it was opened: experts is not whole"):
        file.raw("experts")
    path.unlink()
    with pytest.raises(InputError, match=r"cannot read .*No such file"):
        file.raw("norm")


def test_a_missing_tensor_is_named(path):
    with pytest.raises(InputError, match="holds no tensor down"):
        read(path, WHOLE).raw("down")


BROKEN = {
    "no magic": (b"GGML" + WHOLE[4:], "does not begin with the letters GGUF"),
    "short magic": (b"GG", "does not begin with the letters GGUF"),
    "version 1": (header(version=1), "its version is 1"),
    "big-endian": (header(version=3 << 24), "big-endian"),
    "many tensors": (header(tensors=2**62), "claims 4611686018427387904 tensors"),
    "many keys": (header(count=2**64 - 1), "claims 18446744073709551615 keys"),
    "long string": (header([key(b"k", 8, struct.pack("<Q", 2**63))]), "within what starts at byte"),
    "long name": (header([struct.pack("<Q", 2**40)]), "within what starts at byte"),
    "long array": (header([key(b"k", 9, struct.pack("<IQ", 10, 2**60))]), "more than it has room for"),
    "many strings": (header([key(b"k", 9, struct.pack("<IQ", 8, 2**60))]), "more than it has room for"),
    "long string in a list": (
        header([key(b"k", 9, struct.pack("<IQQ", 8, 1, 2**63))]),
        "within a string that starts at",
    ),
    "many arrays": (header([key(b"k", 9, struct.pack("<IQ", 9, 2**60))]), "more than it has room for"),
    "deep arrays": (header([key(b"k", 9, struct.pack("<IQ", 9, 1) * 2000)]), "more than 4 deep"),
    "unknown metadata": (header([key(b"k", 13, b"")]), "unknown type 13 of metadata"),
    "unknown array": (header([key(b"k", 9, struct.pack("<IQ", 99, 0))]), "unknown type 99 of array"),
    "not UTF-8": (header([key(b"k", 8, text(b"\xff\xfe"))]), "not UTF-8"),
    "key twice": (header([key(b"k", 7, b"\1")] * 2), "the key 'k' comes twice"),
    "tensor twice": (header(entries=[entry()] * 2), "the tensor 't' comes twice"),
    "no dimensions": (header(entries=[entry(shape=())]), "has 0 dimensions"),
    "five dimensions": (header(entries=[entry(shape=(1,) * 5)]), "has 5 dimensions"),
    "dimension of 0": (header(entries=[entry(shape=(0,))]), "a dimension of 0"),
    "absurd shape": (header(entries=[entry(shape=(2**63,) * 4)]), "would end at byte"),
    "unknown type": (header(entries=[entry(kind=4)]), "unknown type 4"),
    "half a block": (header(entries=[entry(shape=(48,), kind=8)]), "rows of 48"),
    "misaligned": (header(entries=[entry(offset=3)]), "not a multiple of 32"),
    "beyond the end": (header(entries=[entry(offset=2**62)]), "would end at byte"),
    "just beyond the end": (header(entries=[entry(shape=(17,))]), "would end at byte"),
    "alignment of 0": (header([key(b"general.alignment", 4, bytes(4))]), "alignment is 0"),
    "alignment of 3": (header([key(b"general.alignment", 4, b"\3\0\0\0")]), "alignment is 3"),
    "alignment in words": (header([key(b"general.alignment", 8, text(b"32"))]), "alignment is '32'"),
    "endless name": (header(entries=[entry(name=b"n" * 100_000, kind=4)]), "is not a whole GGUF file"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_files_are_refused_in_one_line(path, content, message):
    with pytest.raises(InputError, match=message) as caught:
        read(path, content)
    line = str(caught.value)
    assert line.startswith(f"{path} is not a whole GGUF file: ")
    assert "\n" not in line
    assert len(line) < 500


def test_what_is_no_file_is_refused(path):
    with pytest.raises(InputError, match=r"cannot read .*: No such file or directory"):
        GGUFFile(path)
    with pytest.raises(InputError, match=r"cannot read .*: Is a directory"):
        GGUFFile(path.parent)
    with pytest.raises(InputError, match="it is empty"):
        read(path, b"")


def test_a_part_of_a_split_file_is_refused(path):
    with pytest.raises(InputError, match="is one of 3 parts"):
        read(path, header([key(b"split.count", 2, struct.pack("<H", 3))]))


def test_every_truncation_is_refused(path):
    end = max(info.offset + info.nbytes for info in read(path, WHOLE).tensors.values())  # only padding follows
    for length in range(end):
        path.write_bytes(WHOLE[:length])
        with pytest.raises(InputError):
            GGUFFile(path)


@settings(max_examples=400, deadline=1000)
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_flipped_bytes_raise_nothing_but_input_errors(scratch, flips):
    content = bytearray(WHOLE)
    for position, value in flips:
        content[position] = value
    try:
        file = read(scratch, bytes(content))
    except InputError:
        return
    for name, info in file.tensors.items():
        assert file.raw(name).nbytes == info.nbytes


@settings(max_examples=200, deadline=1000)
@given(st.binary(max_size=400))
def test_random_bytes_after_the_magic_raise_nothing_but_input_errors(scratch, content):
    try:
        file = read(scratch, b"GGUF" + struct.pack("<I", 3) + content)
    except InputError:
        return
    assert all(info.offset + info.nbytes <= 8 + len(content) for info in file.tensors.values())


def test_a_large_vocabulary_is_read_fast(path):
    """A guard against walking a vocabulary through arrays, which takes seconds; this takes some 50 ms."""
    words = [f"token{i}" for i in range(50_000)]
    file = io.BytesIO()
    GGUFWriter(file, {"tokens": words, "merges": words, "types": [1] * 50_000}, [])
    path.write_bytes(file.getvalue())
    started = time.process_time()
    metadata = GGUFFile(path).metadata
    assert time.process_time() - started < 1
    assert metadata["tokens"] == words


def test_no_torch_is_imported():
    code = "import sys, llmopt.weights.gguf_file; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ, timeout=60)
