"""Folders of safetensors: whole ones are read lazily, broken ones refused in one line with the file's name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmopt.errors import InputError
from llmopt.weights.checkpoint import INDEX, SINGLE, SafetensorsCheckpoint
from llmopt.weights.safetensors_file import DTYPES

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def single(tmp_path):
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, tmp_path / SINGLE)
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    save_file({"a": torch.arange(6.0).view(2, 3)}, tmp_path / FIRST)
    save_file({"b": torch.ones(4, dtype=torch.int8)}, tmp_path / SECOND)
    write_index(tmp_path, {"a": FIRST, "b": SECOND})
    return tmp_path


def write_index(folder: Path, weight_map) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        SafetensorsCheckpoint(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_single_file(single):
    checkpoint = SafetensorsCheckpoint(single)
    assert set(checkpoint.names()) == {"a", "b"}
    assert checkpoint.shape("a") == (2, 3)
    assert checkpoint.dtype("b") == torch.bfloat16
    assert torch.equal(checkpoint.load("a"), torch.arange(6.0).view(2, 3))
    assert checkpoint.load("b").dtype == torch.bfloat16


def test_shards(sharded):
    checkpoint = SafetensorsCheckpoint(str(sharded))
    assert set(checkpoint.names()) == {"a", "b"}
    assert checkpoint.dtype("b") == torch.int8
    assert torch.equal(checkpoint.load("b"), torch.ones(4, dtype=torch.int8))
    assert checkpoint.shape("a") == (2, 3)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_every_dtype(tmp_path, dtype):
    save_file({"a": torch.zeros(2, dtype=dtype)}, tmp_path / SINGLE)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert checkpoint.dtype("a") == dtype
    assert checkpoint.load("a").dtype == dtype


def test_a_missing_tensor_is_named(single):
    checkpoint = SafetensorsCheckpoint(single)
    for read in (checkpoint.load, checkpoint.shape, checkpoint.dtype):
        with pytest.raises(InputError, match="holds no tensor c"):
            read("c")


def test_no_folder_and_no_safetensors(tmp_path):
    refused(tmp_path / "absent", "is not a folder")
    refused(tmp_path, "holds neither")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused(tmp_path, "which is pickle and never loaded: convert it")


def test_a_file_cut_short_anywhere_is_refused(single):
    whole = (single / SINGLE).read_bytes()
    for length in range(0, len(whole), 7):
        (single / SINGLE).write_bytes(whole[:length])
        refused(single, f"{SINGLE} is not a whole safetensors file")


def test_a_corrupt_header_is_refused(single):
    whole = bytearray((single / SINGLE).read_bytes())
    for content in (b"\xff" * 8 + whole[8:], whole[:8] + b"\0" + whole[9:], b"no safetensors at all"):
        (single / SINGLE).write_bytes(content)
        refused(single, f"{SINGLE} is not a whole safetensors file")


def test_a_shard_that_is_missing_or_broken_is_named(sharded):
    (sharded / SECOND).write_bytes((sharded / SECOND).read_bytes()[:-1])
    refused(sharded, f"{SECOND} is not a whole safetensors file")
    (sharded / SECOND).unlink()
    refused(sharded, f"{INDEX} names {SECOND}, which is missing")


def test_a_tensor_that_is_not_where_the_index_says_is_named(sharded):
    write_index(sharded, {"a": FIRST, "b": FIRST})
    refused(sharded, f"{INDEX} says that b is in {FIRST}, and it is not")


@pytest.mark.parametrize(
    "where", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "pytorch_model.bin", "a\0.safetensors"]
)
def test_an_index_cannot_point_out_of_the_folder(sharded, where):
    save_file({"a": torch.zeros(1)}, sharded.parent / "x.safetensors")
    write_index(sharded, {"a": where})
    refused(sharded, f"{INDEX} names .*, which is")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_an_index_that_is_no_index_is_refused(sharded, text):
    (sharded / INDEX).write_text(text)
    refused(sharded, INDEX)


def test_an_index_that_is_not_text_is_refused(sharded):
    (sharded / INDEX).write_bytes(b"\xff\xfe\x00")
    refused(sharded, f"{INDEX} cannot be read as JSON")
