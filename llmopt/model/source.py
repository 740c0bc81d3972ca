"""Where a model comes from: a Hugging Face folder or a GGUF file, behind one door, read one tensor at a time."""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmopt.errors import InputError
from llmopt.model import gguf_names, hf_names, rope
from llmopt.model.architectures import ARCHITECTURES, config_from_gguf, config_from_hf, config_to_hf, text_config
from llmopt.model.config import ModelConfig
from llmopt.model.locate import locate
from llmopt.model.tokenizer import Tokenizer, read_json, tokenizer_from_folder, tokenizer_from_gguf
from llmopt.weights import gguf_tensors
from llmopt.weights.checkpoint import SafetensorsCheckpoint
from llmopt.weights.formats import find_format
from llmopt.weights.gguf_file import GGUFFile, GGUFTensorInfo
from llmopt.weights.quantized import QuantizedTensor, Weight

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


def layer_name(layer: int, name: str) -> str:
    """The full name of a parameter or module of a decoder layer."""
    return f"model.layers.{layer}.{name}"


class ModelSource(ABC):
    """A model on disk. Parameters go by their Hugging Face names; matrices are [out, in].

    Attributes:
        path: the folder or the .gguf file.
        config: the model's shape.
    """

    path: Path
    config: ModelConfig

    @abstractmethod
    def weight(self, name: str) -> Weight:
        """A parameter as it is stored: quantized, or in its floating-point dtype. Raises InputError if missing."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that `weight` would have, from the header alone. Raises InputError if missing."""

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer: ...

    @property
    @abstractmethod
    def hf_config(self) -> dict[str, Any]:
        """The content of a config.json without any `quantization_config`."""

    @property
    @abstractmethod
    def generation_config(self) -> dict[str, Any]:
        """The content of a generation_config.json: end tokens and the sampling that the model's makers advise."""

    @abstractmethod
    def files(self) -> list[Path]:
        """The files that hold the weights."""

    def layer(self, index: int) -> dict[str, Weight]:
        """The parameters of one decoder layer, by their names within it, with their shapes checked."""
        shapes = self.config.layer_shapes(index)
        return {name: self.checked(layer_name(index, name), shape) for name, shape in shapes.items()}

    def checked(self, name: str, shape: tuple[int, ...]) -> Weight:
        """A parameter that must have this shape. Raises InputError where it has another."""
        weight = self.weight(name)
        self._compare(name, tuple(weight.shape), shape)
        return weight

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise InputError where a parameter is missing or of another shape, without reading its values."""
        self._compare(name, self.shape(name), shape)

    def _compare(self, name: str, found: tuple[int, ...], shape: tuple[int, ...]) -> None:
        if found != shape:
            raise InputError(f"{self.path}: {name} is {list(found)}, but its config says {list(shape)}")

    @property
    def embedding(self) -> Weight:
        return self.checked(EMBEDDING, (self.config.vocab_size, self.config.hidden_size))

    @property
    def head(self) -> Weight:
        """The matrix of the output layer, which is the embedding's where they are tied."""
        if self.config.tie_word_embeddings:
            return self.embedding
        return self.checked(HEAD, (self.config.vocab_size, self.config.hidden_size))

    @property
    def final_norm(self) -> Tensor:
        return as_dense(self.checked(FINAL_NORM, (self.config.hidden_size,)))

    def fingerprint(self) -> str:
        """A hash of the weights' files: their names, sizes and first and last mebibyte."""
        digest = hashlib.sha256()
        for file in self.files():
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}:".encode())
            with file.open("rb") as content:
                digest.update(content.read(1 << 20))
                content.seek(max(0, size - (1 << 20)))
                digest.update(content.read(1 << 20))
        return digest.hexdigest()


class FolderSource(ModelSource):
    """A Hugging Face folder with safetensors, quantized in one of the formats that `weights/formats` reads, or not.

    Of a model that also sees, the decoder of text is read, and the rest is left.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        where = str(folder / "config.json")
        config = read_json(folder / "config.json")
        self.quantization_config = config.pop("quantization_config", None)
        self._hf_config = text_config(config, where)
        self.config = config_from_hf(self._hf_config, where)
        self.architecture = ARCHITECTURES[self.config.architecture]
        self.checkpoint = SafetensorsCheckpoint(folder)
        self._names = frozenset(self.checkpoint.names())
        self._prefix = hf_names.prefix(self._names) if self.architecture.multimodal_class else ""
        self._format = None if self.quantization_config is None else find_format(self.quantization_config)
        self._shared: dict[str, Weight] | None = None  # while a layer is read, what several of its parameters share
        if self.config.tie_word_embeddings and self._full(EMBEDDING) not in self._names and HEAD in self._names:
            raise InputError(f"{folder} ties its embeddings to a head but holds only {HEAD}; {EMBEDDING} is needed")

    def layer(self, index: int) -> dict[str, Weight]:
        self._shared = {}
        try:
            return super().layer(index)
        finally:
            self._shared = None

    def weight(self, name: str) -> Weight:
        place = self._place(name)
        if place.rows is None and place.expert is None:
            return self._load(place.tensor)
        shared = {} if self._shared is None else self._shared
        if place.tensor not in shared:
            shared[place.tensor] = self._load(place.tensor)
        whole = shared[place.tensor]
        self._check_rows(place, tuple(whole.shape))
        if isinstance(whole, QuantizedTensor):
            return whole.select_rows(place.rows or slice(None))
        one = whole if place.expert is None else whole[place.expert]
        return one[place.rows or slice(None)]

    def shape(self, name: str) -> tuple[int, ...]:
        place = self._place(name)
        if self._format is not None and self._is_quantized(place.tensor):
            shape: tuple[int, ...] = self._format.shape(place.tensor.removesuffix(".weight"), self._outline)
        else:
            self._check_dense(place.tensor)
            shape = self.checkpoint.shape(place.tensor)
        self._check_rows(place, shape)
        shape = shape if place.expert is None else shape[1:]
        return shape if place.rows is None else (place.rows.stop - place.rows.start, *shape[1:])

    def _full(self, name: str) -> str:
        """The name of a tensor with what this checkpoint has before it."""
        return hf_names.prefixed(self._prefix, name)

    def _holds(self, name: str) -> bool:
        return self._full(name) in self._names or self._is_quantized(self._full(name))

    def _place(self, name: str) -> hf_names.Place:
        place = hf_names.place(name, self.architecture, self.config, self._holds)
        return replace(place, tensor=self._full(place.tensor))

    def _load(self, tensor: str) -> Weight:
        if self._format is not None and self._is_quantized(tensor):
            return self._format.decode(tensor.removesuffix(".weight"), self.checkpoint.load)
        self._check_dense(tensor)
        return self.checkpoint.load(tensor)

    def _check_rows(self, place: hf_names.Place, shape: tuple[int, ...]) -> None:
        """Raise InputError where a tensor that several parameters share does not hold all of them and no more."""
        wanted = {0: place.of} if place.rows is not None else {}
        if place.expert is not None and self.config.experts is not None:
            wanted = {0: self.config.experts.count} | {axis + 1: length for axis, length in wanted.items()}
        if any(axis >= len(shape) or shape[axis] != length for axis, length in wanted.items()):
            lengths = " by ".join(map(str, wanted.values()))
            raise InputError(f"{self.path}: {place.tensor} is {list(shape)}, but its config says {lengths}")

    def _outline(self, name: str) -> Tensor:
        """A tensor of the checkpoint without its values, but for the few that tell a shape."""
        shape = self.checkpoint.shape(name)
        if prod(shape) <= 2:
            return self.checkpoint.load(name)
        return torch.empty(shape, dtype=self.checkpoint.dtype(name), device="meta")

    def _check_dense(self, name: str) -> None:
        if name not in self._names:
            raise InputError(f"{self.path} holds no tensor {name}, which its config calls for")
        dtype = self.checkpoint.dtype(name)
        if not dtype.is_floating_point or dtype.itemsize < 2:  # 8 bits are codes, whose scales are missing
            raise InputError(f"{self.path}: {name} is {dtype}, not floating point of 16 bits or more")

    def _is_quantized(self, name: str) -> bool:
        return self._format is not None and self._format.holds(name.removesuffix(".weight"), self._names)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return tokenizer_from_folder(self.path)

    @property
    def hf_config(self) -> dict[str, Any]:
        return dict(self._hf_config)

    @property
    def generation_config(self) -> dict[str, Any]:
        return read_json(self.path / "generation_config.json", {})

    def files(self) -> list[Path]:
        return sorted(self.path.glob("*.safetensors"))


class GGUFSource(ModelSource):
    """A GGUF file; the block types of `BLOCK_TYPES` stay quantized, others become float32."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = GGUFFile(path)
        tensors = self.file.tensors
        factors = gguf_tensors.dense(self.file, "rope_freqs.weight") if "rope_freqs.weight" in tensors else None
        self.config = config_from_gguf(
            self.file.metadata, str(path), tensors.keys(), None if factors is None else factors.tolist()
        )
        self.architecture = ARCHITECTURES[self.config.architecture]
        if factors is not None and not torch.allclose(
            rope.divisors(self.config.rope, self.config.head_dim), factors.float(), rtol=1e-3
        ):
            raise InputError(f"{path}: its rope_freqs are not those of Llama 3's rope scaling, the one that is known")

    def weight(self, name: str) -> Weight:
        weight = gguf_tensors.load(self.file, self._info(name).name)
        heads = gguf_names.permuted_heads(name, self.architecture, self.config)
        return weight if heads is None else gguf_names.pairs_to_halves(weight, heads)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._info(name).shape

    def _info(self, name: str) -> GGUFTensorInfo:
        stored = gguf_names.to_gguf(name)
        if stored not in self.file.tensors:
            raise InputError(f"{self.path} holds no tensor {stored}, which its header calls for")
        return self.file.tensors[stored]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return tokenizer_from_gguf(self.file)

    @property
    def hf_config(self) -> dict[str, Any]:
        return config_to_hf(self.config)

    @property
    def generation_config(self) -> dict[str, Any]:
        ids = {"bos_token_id": self.config.bos_token_id, "pad_token_id": self.tokenizer.pad_id}
        return {"eos_token_id": list(self.config.eos_token_ids), **{k: v for k, v in ids.items() if v is not None}}

    def files(self) -> list[Path]:
        return [self.path]


def open_source(model: str) -> ModelSource:
    """Open MODEL, named as on the command line. Raises InputError where it cannot be found or read."""
    path = locate(model)
    return GGUFSource(path) if path.is_file() else FolderSource(path)


def as_dense(weight: Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """A weight in floating point, whatever it is stored as."""
    return weight.dequantize(dtype) if isinstance(weight, QuantizedTensor) else weight.to(dtype)
