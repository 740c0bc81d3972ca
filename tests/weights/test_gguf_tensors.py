"""Tensors come out of a GGUF file with the values that the gguf package reads in it."""

import gguf
import numpy as np
import pytest
import torch

from llmopt.errors import InputError
from llmopt.weights import gguf_tensors
from llmopt.weights.formats.gguf_blocks import BLOCK_TYPES
from llmopt.weights.gguf_file import TENSOR_TYPES, GGUFFile
from llmopt.weights.gguf_writer import GGUFWriter
from llmopt.weights.quantized import QuantizedTensor

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NO_DECODER = {"F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K", "Q1_0"}
BLOCKS = {name: (block, size) for name, block, size in TENSOR_TYPES.values() if name not in FLOATS}


def open_with(path, name: str, shape: tuple[int, ...], kind: str, tensor: torch.Tensor) -> GGUFFile:
    with path.open("wb") as file:
        writer = GGUFWriter(file, {}, [(name, shape, kind)])
        writer.add(name, tensor)
        writer.finish()
    return GGUFFile(path)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


@pytest.mark.parametrize("kind", FLOATS)
def test_floats_keep_their_dtype(path, kind):
    values = torch.randn(3, 5).to(FLOATS[kind])
    file = open_with(path, "w", (3, 5), kind, values)
    loaded = gguf_tensors.load(file, "w")
    assert loaded.dtype == values.dtype
    assert torch.equal(loaded, values)
    assert gguf_tensors.dense(file, "w").dtype == torch.float32
    assert torch.equal(gguf_tensors.dense(file, "w"), values.float())


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_matrices_in_blocks_of_codes_stay_quantized(path, kind):
    block, size = BLOCKS[kind]
    blocks = torch.randint(0, 0x40, (5, 2 * size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    file = open_with(path, "w", (5, 2 * block), kind, blocks)
    loaded = gguf_tensors.load(file, "w")
    assert isinstance(loaded, QuantizedTensor)
    assert np.array_equal(loaded.dequantize().numpy(), gguf.dequantize(blocks.numpy(), _type(kind)))
    assert torch.equal(gguf_tensors.dense(file, "w"), loaded.dequantize())


@pytest.mark.parametrize("shape", [(64,), (2, 3, 64)])
def test_what_is_not_a_matrix_becomes_dense(path, shape):
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    blocks = gguf.quantize(values, _type("Q8_0"))
    file = open_with(path, "w", shape, "Q8_0", torch.from_numpy(blocks))
    loaded = gguf_tensors.load(file, "w")
    assert loaded.shape == shape
    assert np.array_equal(loaded.numpy(), gguf.dequantize(blocks, _type("Q8_0")))


@pytest.mark.parametrize("kind", sorted(BLOCKS.keys() - NO_DECODER))
def test_every_other_block_type_is_decoded_in_chunks(path, kind, monkeypatch):
    block, size = BLOCKS[kind]
    monkeypatch.setattr(gguf_tensors, "CHUNK_BYTES", 4 * size)  # two rows at a time, and one left over
    # Bytes below 0x40 keep every scale, of whatever width, finite.
    blocks = torch.randint(0, 0x40, (5, 2 * size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    file = open_with(path, "w", (5, 2 * block), kind, blocks)
    values = gguf_tensors.dense(file, "w")
    assert values.dtype == torch.float32
    assert values.shape == (5, 2 * block)
    assert np.array_equal(values.numpy(), gguf.dequantize(blocks.numpy(), _type(kind)))


@pytest.mark.parametrize("kind", sorted(NO_DECODER))
def test_types_without_a_decoder_are_named(path, kind):
    block, size = BLOCKS[kind]
    file = open_with(path, "w", (1, block), kind, torch.zeros(size, dtype=torch.uint8))
    for read in (gguf_tensors.load, gguf_tensors.dense):
        with pytest.raises(InputError, match=f"tensor w is {kind}, which cannot be decoded"):
            read(file, "w")


def test_the_table_of_types_is_ggmls():
    theirs = {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert {number: theirs[number] for number in TENSOR_TYPES} == TENSOR_TYPES


def test_a_missing_tensor_is_named(path):
    file = open_with(path, "w", (2,), "F32", torch.zeros(2))
    with pytest.raises(InputError, match="holds no tensor v"):
        gguf_tensors.load(file, "v")


def _type(kind: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[kind]
