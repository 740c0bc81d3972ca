"""`llmopt.json`: what was done, to what, with what, and how well each part came out. Enough to do it again."""

import platform
import resource
import sys
from dataclasses import asdict
from math import prod
from typing import Any

import torch

import llmopt
from llmopt.model.source import ModelSource
from llmopt.quant.methods.base import ModuleReport
from llmopt.quant.options import Export
from llmopt.quant.phases import Phases
from llmopt.quant.recipe import Recipe

VERSION = 1


def build_manifest(
    recipe: Recipe,
    source: ModelSource,
    export: Export,
    size_bytes: int,
    modules: list[ModuleReport],
    seconds: float,
    phases: Phases,
) -> dict[str, Any]:
    """The manifest of one artifact, which is also what `llmopt quantize --json` writes.

    `size_bytes` is that of the weights as written; `bits_per_weight` spreads it over all parameters, embeddings, norms
    and scales included, those of the model that was read: a head that was tied to the embedding is not counted twice.
    `seconds` is the time of the whole run, `phases` where it went.
    """
    config, schemes = source.config, recipe.modules
    layers = sum(prod(s) for layer in range(config.num_layers) for s in config.layer_shapes(layer).values())
    outer = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2) + config.hidden_size
    parameters = layers + outer
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "version": VERSION,
        "output": export.output,
        "method": recipe.options.method,
        "scheme": recipe.options.scheme,
        "format": export.format,
        "seconds": round(seconds, 3),
        "phases": phases.seconds(),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "size_bytes": size_bytes,
        "bits_per_weight": round(8 * size_bytes / parameters, 4),
        "modules": [asdict(report) | {"scheme": schemes[report.name].name} for report in modules],
        "recipe": recipe.to_dict(),
        "source": {"path": str(source.path), "fingerprint": source.fingerprint()},
        "versions": {
            "llmopt": llmopt.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
