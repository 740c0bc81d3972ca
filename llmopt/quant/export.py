"""Writes a quantized model as an artifact that the rest of the ecosystem loads: a folder, or a GGUF file."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from llmopt.errors import InputError, LlmoptError
from llmopt.model import gguf_names, hf_names, rope
from llmopt.model.architectures import ARCHITECTURES
from llmopt.model.config import ROUTER, ModelConfig
from llmopt.model.decoder import linear_names
from llmopt.model.source import EMBEDDING, FINAL_NORM, HEAD, ModelSource, as_dense, layer_name
from llmopt.model.tokenizer_files import gguf_tokenizer_entries, write_tokenizer
from llmopt.quant.methods.rtn import round_in_parts
from llmopt.quant.options import Export
from llmopt.quant.recipe import Recipe
from llmopt.weights.artifact import ArtifactFile, ArtifactFolder
from llmopt.weights.formats import FORMATS
from llmopt.weights.formats.gguf_blocks import block_type, encode_blocks
from llmopt.weights.formats.gguf_mixes import FILE_TYPES
from llmopt.weights.gguf_writer import STORED_AS, GGUFWriter
from llmopt.weights.quantized import QuantizedTensor, Weight, joined
from llmopt.weights.scheme import SCHEMES, Scheme
from llmopt.weights.shards import ShardWriter

MANIFEST = "llmopt.json"


class Exporter(ABC):
    """Takes a model's parameters by name, in the order of `parameter_order`, then the manifest."""

    export: Export
    size_bytes: int

    @abstractmethod
    def add(self, name: str, weight: Weight) -> None: ...

    @abstractmethod
    def finish(self, manifest: dict[str, Any]) -> None: ...


@contextmanager
def open_exporter(export: Export, recipe: Recipe, source: ModelSource, overwrite: bool) -> Iterator[Exporter]:
    """The exporter of one artifact. What it writes appears under the output's name when the block ends well.

    Raises InputError where the output is taken, or is where the source is.
    """
    check_output(export.output, source)
    if export.format == "gguf":
        with ArtifactFile(export.output, overwrite) as path:
            with path.open("wb") as file:
                exporter = GGUFExporter(export, recipe, source, file)
                yield exporter
            # Before the file itself appears, so that no artifact is ever without its manifest.
            with ArtifactFile(f"{export.output}.{MANIFEST}", overwrite=True) as beside:
                beside.write_text(_json(exporter.manifest), encoding="utf-8")
    else:
        with ArtifactFolder(export.output, overwrite, marker=MANIFEST) as folder:
            yield FolderExporter(export, recipe, source, folder)


def check_output(output: str, source: ModelSource) -> None:
    """Raise InputError where the output would take the place of the model that is read."""
    place, origin = Path(output).expanduser().resolve(), source.path.resolve()
    if place == origin or place in origin.parents:
        raise InputError(f"the output {output} is, or holds, the model that is read; choose another output")


def parameter_order(source: ModelSource) -> dict[str, tuple[int, ...]]:
    """The names and shapes of all parameters, in the order in which they are read and written."""
    config = source.config
    order: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_layers):
        order |= {layer_name(layer, name): shape for name, shape in config.layer_shapes(layer).items()}
    order[FINAL_NORM] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        order[HEAD] = (config.vocab_size, config.hidden_size)
    return order


class FolderExporter(Exporter):
    """A Hugging Face folder: safetensors, configuration, tokenizer, `llmopt.json`."""

    def __init__(self, export: Export, recipe: Recipe, source: ModelSource, folder: Path) -> None:
        self.export = export
        self.source = source
        self.folder = folder
        self.architecture = ARCHITECTURES[source.config.architecture]
        self.schemes = recipe.modules
        self.own_head = recipe.head is not None
        modules = dict.fromkeys([*linear_names(source.config), *_routers(source.config), *self.schemes])
        schemes = {self._module(name): self.schemes.get(name, SCHEMES["f16"]) for name in modules}
        kind = FORMATS[str(export.format)]
        self.format = kind.for_schemes(schemes, desc_act=recipe.options.desc_act, damp=recipe.options.damp)
        self.shards = ShardWriter(folder)
        self.dtype_name = source.hf_config.get("dtype") or source.hf_config.get("torch_dtype") or "float16"
        self.dtype = getattr(torch, self.dtype_name)
        self._waiting: dict[str, Weight] = {}  # parts of a tensor whose others are still to come

    @property
    def size_bytes(self) -> int:  # type: ignore[override]
        return self.shards.size_bytes

    def add(self, name: str, weight: Weight) -> None:
        tensor, members = hf_names.written(name, self.architecture)
        self._waiting[name] = weight
        if any(member not in self._waiting for member in members):
            return
        self._write(tensor, joined([self._waiting.pop(member) for member in members]))

    def _write(self, name: str, weight: Weight) -> None:
        kept = name == EMBEDDING or (name == HEAD and not self.own_head)
        if isinstance(weight, QuantizedTensor) and not kept:
            for part, tensor in self.format.encode(name.removesuffix(".weight"), weight).items():
                self.shards.add(part, tensor)
        else:
            self.shards.add(name, as_dense(weight, self.dtype))

    def written(self) -> dict[str, tuple[tuple[int, ...], Scheme | None]]:
        """The tensors of the artifact before the format encodes them: names, shapes and schemes, None for dense."""
        order = parameter_order(self.source)
        if self.own_head:  # also where the model has it tied to the embedding
            order[HEAD] = order[EMBEDDING]
        tensors: dict[str, tuple[tuple[int, ...], Scheme | None]] = {}
        for name in order:
            tensor, members = hf_names.written(name, self.architecture)
            rows = sum(order[member][0] for member in members)
            tensors[tensor] = (rows, *order[name][1:]), self.schemes.get(name.removesuffix(".weight"))
        return tensors

    def _module(self, name: str) -> str:
        """The name in the artifact of the module that holds a linear layer."""
        return hf_names.written(f"{name}.weight", self.architecture)[0].removesuffix(".weight")

    def finish(self, manifest: dict[str, Any]) -> None:
        self.shards.close()
        finish_folder(self.source, self.folder, self.dtype_name, self.format.config(), manifest, own_head=self.own_head)


def _routers(config: ModelConfig) -> list[str]:
    """The modules that choose among experts: to whoever reads the settings they are linear layers too, left dense."""
    layers = [layer for layer in range(config.num_layers) if config.has_experts(layer)]
    return [layer_name(layer, ROUTER).removesuffix(".weight") for layer in layers]


def finish_folder(
    source: ModelSource,
    folder: Path,
    dtype_name: str,
    quantization: dict[str, Any],
    manifest: dict[str, Any],
    own_head: bool = False,
) -> None:
    """Write what a Hugging Face folder holds beside its weights: tokenizer, configuration, `llmopt.json`.

    `dtype_name` is that of the weights that are not quantized, `quantization` the `quantization_config`; `own_head`
    says that the head is a matrix of its own, whatever it is in the source.
    """

    def write(name: str, content: dict[str, Any]) -> None:
        (folder / name).write_text(_json(content), encoding="utf-8")

    write_tokenizer(source, folder)
    config = {key: value for key, value in source.hf_config.items() if key not in ("dtype", "torch_dtype")}
    config |= {"tie_word_embeddings": False} if own_head else {}
    # Both names: transformers 4 knows the second only.
    dtypes = {"dtype": dtype_name, "torch_dtype": dtype_name}
    write("config.json", config | dtypes | {"quantization_config": quantization})
    if source.generation_config:  # an empty one would hide config.json's end token
        write("generation_config.json", source.generation_config)
    if quantization["quant_method"] == "gptq":  # where auto-gptq looks
        write("quantize_config.json", quantization)
    write(MANIFEST, manifest)


class GGUFExporter(Exporter):
    """One GGUF file. Its header holds the recipe; the manifest, known only at the end, goes into a file beside it."""

    def __init__(self, export: Export, recipe: Recipe, source: ModelSource, file: Any) -> None:
        self.export = export
        self.config = source.config
        self.architecture = ARCHITECTURES[source.config.architecture]
        order = parameter_order(source)
        self.types = {name: _gguf_type(recipe, name, shape) for name, shape in order.items()}
        tensors = [(gguf_names.to_gguf(name), shape, self.types[name]) for name, shape in order.items()]
        self.factors = None
        if self.config.rope.kind == "llama3":
            self.factors = rope.divisors(self.config.rope, self.config.head_dim)
            tensors.insert(0, ("rope_freqs.weight", tuple(self.factors.shape), "F32"))
        self.writer = GGUFWriter(file, _gguf_metadata(recipe, source), tensors)
        self.size_bytes = sum(info.nbytes for info in self.writer.tensors.values())
        if self.factors is not None:
            self.writer.add("rope_freqs.weight", self.factors)

    def add(self, name: str, weight: Weight) -> None:
        heads = gguf_names.permuted_heads(name, self.architecture, self.config)
        if heads is not None:
            weight = gguf_names.halves_to_pairs(weight, heads)
        kind = self.types[name]
        if kind in STORED_AS:
            self.writer.add(gguf_names.to_gguf(name), as_dense(weight, STORED_AS[kind]))
            return
        blocks = encode_blocks(weight) if _fits(weight, kind) else _rounded(weight, SCHEMES[kind.lower()])
        self.writer.add(gguf_names.to_gguf(name), blocks)

    def finish(self, manifest: dict[str, Any]) -> None:
        self.writer.finish()
        self.manifest = manifest


def _fits(weight: Weight, kind: str) -> TypeGuard[QuantizedTensor]:
    """Whether a weight is in the codes of this block type already, so that it is written as it is."""
    try:
        return isinstance(weight, QuantizedTensor) and block_type(weight) == kind
    except LlmoptError:
        return False


def _rounded(weight: Weight, scheme: Scheme) -> Tensor:
    """The blocks of a weight that is in other codes or in none; some rows at a time, as no block spans two."""
    return torch.cat([encode_blocks(rounded) for _, rounded in round_in_parts(weight, scheme)])


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _gguf_type(recipe: Recipe, name: str, shape: tuple[int, ...]) -> str:
    """A tensor's type: vectors in float32, matrices in their scheme's, and what has none in 16 bits."""
    if len(shape) == 1:
        return "F32"
    scheme = recipe.outer.get(name) or recipe.schemes.get(name.removesuffix(".weight"))
    dense = recipe.main.gguf_type if recipe.main.is_dense else "F16"
    return str(dense if scheme is None else scheme.gguf_type)


def _gguf_metadata(recipe: Recipe, source: ModelSource) -> dict[str, Any]:
    config = source.config
    name = ARCHITECTURES[config.architecture].gguf_name
    window = config.windows[0]
    if any(other != window for other in config.windows):
        raise InputError("the model has sliding windows on some of its layers only, which GGUF cannot say")
    recipe_keys = {key: value for key, value in recipe.to_dict().items() if key != "head"}  # which is not for GGUF
    metadata: dict[str, Any] = {
        "general.architecture": name,
        "general.name": source.path.stem,
        "general.file_type": FILE_TYPES.get(recipe.options.scheme, FILE_TYPES["f16"]),
        "general.quantization_version": 2,
        "llmopt.recipe": json.dumps(recipe_keys, sort_keys=True),
        f"{name}.context_length": config.max_position,
        f"{name}.embedding_length": config.hidden_size,
        f"{name}.block_count": config.num_layers,
        f"{name}.feed_forward_length": config.intermediate_size,
        f"{name}.attention.head_count": config.num_heads,
        f"{name}.attention.head_count_kv": config.num_kv_heads,
        f"{name}.attention.key_length": config.head_dim,
        f"{name}.attention.value_length": config.head_dim,
        f"{name}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{name}.rope.freq_base": config.rope.theta,
        f"{name}.rope.dimension_count": config.head_dim,
        f"{name}.vocab_size": config.vocab_size,
    }
    if window is not None:
        metadata[f"{name}.attention.sliding_window"] = window
    if config.rope.kind == "linear":
        metadata |= {f"{name}.rope.scaling.type": "linear", f"{name}.rope.scaling.factor": config.rope.factor}
    if config.rope.kind == "llama3":
        metadata[f"{name}.rope.scaling.original_context_length"] = config.rope.original_max_position
    return metadata | gguf_tokenizer_entries(source)
