"""What the writer writes, both the gguf package's reader and ours read back."""

import io

import gguf
import numpy as np
import pytest
import torch

from llmopt.errors import LlmoptError
from llmopt.weights import gguf_tensors
from llmopt.weights.gguf_file import GGUFFile
from llmopt.weights.gguf_writer import GGUFWriter

METADATA = {
    "general.architecture": "llama",
    "general.name": "",
    "a.flag": True,
    "a.count": 7,
    "a.negative": -7,
    "a.large": 2**40,
    "a.largest": 2**64 - 1,
    "a.ratio": 0.5,
    "a.wide": np.uint64(9),
    "a.double": np.float64(0.1),
    "a.words": ["one", "", "drei", "四"],
    "a.types": [1, 2, 3],
    "a.scores": [0.0, -1.5],
    "a.flags": [True, False],
    "a.bytes": np.array([1, 255], np.uint8),
    "a.nothing": [],
}
KINDS = {
    "a.count": "UINT32", "a.negative": "INT32", "a.large": "INT64", "a.largest": "UINT64", "a.ratio": "FLOAT32",
    "a.wide": "UINT64", "a.double": "FLOAT64", "a.flag": "BOOL",
}  # fmt: skip
MEMBER_KINDS = {"a.types": "INT32", "a.scores": "FLOAT32", "a.flags": "BOOL", "a.bytes": "UINT8", "a.words": "STRING"}


def blocks(values: np.ndarray, kind: str) -> torch.Tensor:
    return torch.from_numpy(gguf.quantize(values, gguf.GGMLQuantizationType[kind]))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A file with one tensor of several types each, and the values that went in."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    random = np.random.default_rng(0)
    matrix = random.standard_normal((6, 64)).astype(np.float32)
    tensors = {
        "norm": ("F32", (5,), torch.arange(5, dtype=torch.float32)),
        "half": ("F16", (3, 4), torch.randn(4, 3).half().T),  # not contiguous
        "brain": ("BF16", (3, 7), torch.randn(3, 7).bfloat16()),
        "eight": ("Q8_0", (6, 64), blocks(matrix, "Q8_0")),
        "four": ("Q4_1", (6, 64), blocks(matrix, "Q4_1")),
    }
    with path.open("wb") as file:
        writer = GGUFWriter(file, METADATA, [(name, shape, kind) for name, (kind, shape, _) in tensors.items()])
        for name, (_, _, tensor) in tensors.items():
            writer.add(name, tensor)
        writer.finish()
    return path, tensors, writer


def test_our_reader_reads_it(written):
    path, tensors, writer = written
    file = GGUFFile(path)
    assert file.tensors == writer.tensors
    expected = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in METADATA.items()}
    assert file.metadata == expected
    for name in ("norm", "half", "brain"):
        assert torch.equal(gguf_tensors.load(file, name), tensors[name][2])
    for name in ("eight", "four"):
        assert file.raw(name).tobytes() == tensors[name][2].numpy().tobytes()


def test_the_gguf_package_reads_it(written):
    path, tensors, writer = written
    reader = gguf.GGUFReader(path)
    for key, kind in KINDS.items():
        assert reader.fields[key].types == [gguf.GGUFValueType[kind]]
    for key, kind in MEMBER_KINDS.items():
        assert reader.fields[key].types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType[kind]]
        assert reader.fields[key].contents() == list(METADATA[key])
    assert [tensor.name for tensor in reader.tensors] == list(tensors)
    for tensor in reader.tensors:
        kind, shape, content = tensors[tensor.name]
        assert tensor.tensor_type.name == kind
        assert tuple(tensor.shape[::-1]) == shape
        assert tensor.data_offset == writer.tensors[tensor.name].offset
        assert tensor.data.tobytes() == content.contiguous().view(torch.uint8).numpy().tobytes()


def test_every_tensor_begins_and_ends_aligned(written):
    path, _, writer = written
    assert all(info.offset % 32 == 0 for info in writer.tensors.values())
    assert path.stat().st_size % 32 == 0


def test_rows_that_are_not_whole_blocks_are_refused():
    with pytest.raises(LlmoptError, match="up has rows of 48, which Q4_0's blocks of 32 do not divide"):
        GGUFWriter(io.BytesIO(), {}, [("up", (2, 48), "Q4_0")])


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"a": None}, [], "a is NoneType"),
        ({"a": 2**64}, [], "a is int"),
        ({"a": {"b": 1}}, [], "a is dict"),
        ({"a": ["x", 1]}, [], "a is a list of members"),
        ({"a": np.array([1j])}, [], "a is a list of members"),
        ({"general.alignment": 64}, [], "alignment"),
        ({}, [("t", (2,), "F32"), ("t", (2,), "F32")], "listed twice"),
        ({}, [("t", (2,), "Q9")], "not a type"),
        ({}, [("t", (2, 0), "F32")], "none of them 0"),
        ({}, [("t", (1, 1, 1, 1, 1), "F32")], "1 to 4 dimensions"),
    ],
)
def test_what_gguf_cannot_hold_is_refused(metadata, tensors, message):
    with pytest.raises(ValueError, match=message):
        GGUFWriter(io.BytesIO(), metadata, tensors)


def test_tensors_come_in_order_whole_and_all():
    writer = GGUFWriter(io.BytesIO(), {}, [("a", (2,), "F32"), ("b", (2,), "F16"), ("c", (2,), "F16")])
    with pytest.raises(ValueError, match="b was given where a is next"):
        writer.add("b", torch.zeros(2))
    writer.add("a", torch.zeros(2))
    with pytest.raises(ValueError, match=r"b is 4 bytes of torch\.bfloat16"):
        writer.add("b", torch.zeros(2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="2 tensors were not given, first b"):
        writer.finish()
