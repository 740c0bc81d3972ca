"""How weights lie in files: one pure pair of functions, encode and decode, for each format."""

from typing import Any

from llmopt.errors import InputError
from llmopt.weights.formats.awq import AWQ
from llmopt.weights.formats.base import Format
from llmopt.weights.formats.compressed_tensors import CompressedTensors
from llmopt.weights.formats.gptq import GPTQ

FORMATS: dict[str, type[Format]] = {kind.name: kind for kind in (GPTQ, AWQ, CompressedTensors)}
"""The formats of safetensors checkpoints, by the name that is both the command line's and config.json's."""


def find_format(quantization_config: dict[str, Any]) -> Format:
    """The reader of a checkpoint, from its config.json's `quantization_config`.

    Raises InputError, naming those that are known, for a method that is not, and for settings that cannot be read.
    """
    method = quantization_config.get("quant_method") if isinstance(quantization_config, dict) else None
    if not isinstance(method, str) or method not in FORMATS:
        raise InputError(f"quantization method {method!r} is not known; known: {', '.join(FORMATS)}")
    return FORMATS[method].parse(quantization_config)


__all__ = ["FORMATS", "Format", "find_format"]
