"""Quantizes a model layer by layer: read, calibrate, choose codes, write, forget."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmopt.backend.reference import ReferenceBackend
from llmopt.backend.select import fast_products
from llmopt.errors import LlmoptError
from llmopt.model.decoder import DecoderLayer
from llmopt.model.source import EMBEDDING, FINAL_NORM, HEAD, ModelSource, as_dense, layer_name, open_source
from llmopt.progress import Progress, silent
from llmopt.quant.calibration import CalibrationSweep
from llmopt.quant.export import open_exporter
from llmopt.quant.manifest import build_manifest
from llmopt.quant.methods.base import Method, ModuleReport
from llmopt.quant.options import Options, make_options
from llmopt.quant.phases import Phases
from llmopt.quant.recipe import Recipe, resolve
from llmopt.quant.samples import calibration_tokens
from llmopt.weights.quantized import QuantizedTensor, Weight


def quantize(
    model: str,
    output: str,
    *,
    format: str | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
    **options: Any,
) -> dict[str, Any]:
    """Write a quantized copy of a model; the options are those of `Options`, the flags of `llmopt quantize`.

    Returns the result as `llmopt quantize --json` documents it. Raises InputError for options that do not go together
    and LlmoptError where it cannot be done; then there is nothing under `output`.
    """
    exports = [{"output": output, "format": format}]
    (result,) = run(make_options({"model": model, "exports": exports, **options}), overwrite, progress)
    return result


def run(options: Options, overwrite: bool = False, progress: Progress = silent) -> list[dict[str, Any]]:
    """Do all that the options ask for. Returns the manifest of each export. Raises as `quantize` does."""
    started = time.monotonic()
    phases = Phases()
    source = open_source(options.model)
    recipe = resolve(options, source.config)
    torch.manual_seed(options.seed)
    with ExitStack() as stack, torch.inference_mode():
        exporters = [
            stack.enter_context(open_exporter(export, recipe, source, overwrite)) for export in recipe.options.exports
        ]

        def add(name: str, weight: Weight) -> None:
            _check_finite(name, weight)
            with phases("write"):
                for exporter in exporters:
                    exporter.add(name, weight)

        add(EMBEDDING, source.embedding)
        modules = _quantize_layers(recipe, source, add, phases, progress)
        add(FINAL_NORM, source.final_norm)
        if not source.config.tie_word_embeddings:
            add(HEAD, source.head)
        manifests = []
        for exporter in exporters:
            seconds = time.monotonic() - started
            manifests.append(
                build_manifest(recipe, source, exporter.export, exporter.size_bytes, modules, seconds, phases)
            )
            exporter.finish(manifests[-1])
    return manifests


def _quantize_layers(
    recipe: Recipe, source: ModelSource, add: Callable[[str, Weight], None], phases: Phases, progress: Progress
) -> list[ModuleReport]:
    method = recipe.build_method(source.config)
    backend = ReferenceBackend(recipe.device, products=fast_products(recipe.device))
    sweep = _start_sweep(recipe, source, method, backend, phases, progress)
    reports: list[ModuleReport] = []
    for index in range(source.config.num_layers):
        progress(f"quantizing{_last_error(reports)}", index, source.config.num_layers)
        with phases("read"):
            weights = {name: as_dense(weight) for name, weight in source.layer(index).items()}
        with phases("observe"):
            statistics = {} if sweep is None else sweep.observe(DecoderLayer(source.config, index, weights, backend))
        with phases("choose codes"):
            result = method.quantize_layer(weights, recipe.layer_schemes(index), statistics)
        for name, weight in result.weights.items():
            add(layer_name(index, name), weight)
        reports += [replace(report, name=layer_name(index, report.name)) for report in result.modules]
        if sweep is not None and index + 1 < source.config.num_layers:
            with phases("advance"):
                sweep.advance(DecoderLayer(source.config, index, result.weights, backend))
    return reports


def _start_sweep(
    recipe: Recipe, source: ModelSource, method: Method, backend: ReferenceBackend, phases: Phases, progress: Progress
) -> CalibrationSweep | None:
    if recipe.calibration is None:
        return None
    options = recipe.options
    with phases("sample"):
        tokens = calibration_tokens(
            recipe.calibration, source, options.samples, options.seq_len, options.seed, recipe.device, progress
        )
    return CalibrationSweep(source, tokens, backend, method.needs_gram, method.keep_rows)


def _last_error(reports: list[ModuleReport]) -> str:
    """The error of the layer before, for the progress bar."""
    last = reports[-7:]
    return f" (last layer's error {sum(r.error for r in last) / len(last):.2%})" if last else ""


def _check_finite(name: str, weight: Weight) -> None:
    tensors: list[Tensor] = [weight] if isinstance(weight, Tensor) else [weight.scales.float()]
    if isinstance(weight, QuantizedTensor) and weight.minimums is not None:
        tensors.append(weight.minimums.float())
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise LlmoptError(f"{name} came out with values that are not finite; nothing was written")
