"""A finished layer as a file: its parameters in the canonical form and its reports, with a checksum over all of it."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmopt.errors import InputError
from llmopt.quant.methods.base import LayerResult, ModuleReport
from llmopt.weights.artifact import ArtifactFile
from llmopt.weights.quantized import QuantizedTensor, Scales, TwoLevel, Weight
from llmopt.weights.safetensors_file import SafetensorsFile

_SCALES = ("scales", "minimums")  # what may be in two levels
_TENSORS = ("codes", "zeros", "group_index")
_SETTINGS = ("bits", "activations", "number")


def write_layer(path: Path, result: LayerResult) -> None:
    """Write a layer whole or not at all. Raises LlmoptError where the disk is full."""
    tensors = {key: tensor for name, weight in result.weights.items() for key, tensor in _parts(name, weight)}
    content = json.dumps(
        {
            "weights": {name: _settings(weight) for name, weight in result.weights.items()},
            "modules": [asdict(report) for report in result.modules],
        }
    )
    # Copies, because safetensors refuses tensors that share memory, as the factors of a fused matrix do.
    tensors = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    with ArtifactFile(path, overwrite=True) as partial:
        save_file(tensors, partial, metadata={"content": content, "checksum": _checksum(content, tensors)})


def read_layer(path: Path) -> LayerResult | None:
    """The layer that was written; None where the file is not, to the last bit, what was written."""
    try:
        file = SafetensorsFile(path)
        tensors = {key: file.load(key) for key in file.tensors}
    except InputError:
        return None
    content = file.metadata.get("content", "")
    if _checksum(content, tensors) != file.metadata.get("checksum"):
        return None
    described = json.loads(content)
    weights = {name: _weight(name, settings, tensors) for name, settings in described["weights"].items()}
    return LayerResult(weights, [ModuleReport(**report) for report in described["modules"]])


def checksum(tensor: Tensor) -> str:
    """Of a tensor's shape, dtype and content."""
    return _checksum("", {"": tensor})


def _checksum(content: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(content.encode())
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        digest.update(f"{key}:{tensor.dtype}:{list(tensor.shape)}:".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _settings(weight: Weight) -> dict[str, Any] | None:
    """What of a weight is no tensor; None for one that is not quantized."""
    if not isinstance(weight, QuantizedTensor):
        return None
    return {name: getattr(weight, name) for name in _SETTINGS}


def _parts(name: str, weight: Weight) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(weight, QuantizedTensor):
        yield name, weight
        return
    for part in _TENSORS:
        if (tensor := getattr(weight, part)) is not None:
            yield f"{name}:{part}", tensor
    for part in _SCALES:
        scales: Scales | None = getattr(weight, part)
        if isinstance(scales, TwoLevel):
            yield f"{name}:{part}.values", scales.values
            yield f"{name}:{part}.factors", scales.factors
        elif scales is not None:
            yield f"{name}:{part}", scales


def _weight(name: str, settings: dict[str, Any] | None, tensors: Mapping[str, Tensor]) -> Weight:
    if settings is None:
        return tensors[name]
    parts: dict[str, Any] = {part: tensors.get(f"{name}:{part}") for part in (*_TENSORS, *_SCALES)}
    for part in _SCALES:
        if f"{name}:{part}.values" in tensors:
            parts[part] = TwoLevel(tensors[f"{name}:{part}.values"], tensors[f"{name}:{part}.factors"])
    return QuantizedTensor(**parts, **settings)
