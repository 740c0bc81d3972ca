"""Quantizes a model layer by layer: read, calibrate, choose codes, write, forget."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmopt.backend.reference import ReferenceBackend
from llmopt.backend.select import fast_products
from llmopt.errors import InputError, LlmoptError
from llmopt.model.decoder import DecoderLayer
from llmopt.model.source import EMBEDDING, FINAL_NORM, HEAD, ModelSource, as_dense, layer_name, open_source
from llmopt.progress import Progress, silent
from llmopt.quant.activations import fit_in_memory
from llmopt.quant.calibration import CalibrationSweep
from llmopt.quant.export import open_exporter
from llmopt.quant.head import round_head
from llmopt.quant.legacy.run import check_quantizer, quantize_with_package
from llmopt.quant.manifest import build_manifest
from llmopt.quant.methods.base import LayerResult, Method, ModuleReport
from llmopt.quant.options import Options, make_options
from llmopt.quant.phases import Phases
from llmopt.quant.plan import check
from llmopt.quant.recipe import Recipe, resolve
from llmopt.quant.samples import calibration_tokens
from llmopt.quant.sensitivity import measure
from llmopt.quant.work import WorkFolder
from llmopt.weights.numbers import all_finite
from llmopt.weights.quantized import Weight
from llmopt.weights.scheme import Scheme


def quantize(
    model: str,
    output: str,
    *,
    format: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress = silent,
    **options: Any,
) -> dict[str, Any]:
    """Write a quantized copy of a model; the options are those of `Options`, the flags of `llmopt quantize`.

    A run that calibrates keeps the layers it has finished in a hidden folder beside the output until it is done;
    `resume` goes on after one that was interrupted, and gives the same bytes.

    Returns the result as `llmopt quantize --json` documents it. Raises InputError for options that do not go together
    and LlmoptError where it cannot be done; then there is nothing under `output`.
    """
    exports = [{"output": output, "format": format}]
    (result,) = run(make_options({"model": model, "exports": exports, **options}), overwrite, progress, resume)
    return result


def run(
    options: Options, overwrite: bool = False, progress: Progress = silent, resume: bool = False
) -> list[dict[str, Any]]:
    """Do all that the options ask for. Returns the manifest of each export. Raises as `quantize` does."""
    started = time.monotonic()
    phases = Phases()
    source = open_source(options.model)
    recipe = resolve(options, source.config)
    check_quantizer(recipe, source.config)
    check(recipe, source, overwrite)
    torch.manual_seed(options.seed)
    if options.quantizer != "native":
        with phases("sample"):
            tokens = _calibration_tokens(recipe, source, progress)
        return [
            quantize_with_package(
                recipe, source, tokens, phases, started=started, overwrite=overwrite, progress=progress
            )
        ]
    # The work folder is closed last: what it keeps must outlive a failure to publish.
    with WorkFolder(recipe, source, resume, overwrite) as work, ExitStack() as stack, torch.inference_mode():
        samples: Tensor | None = None
        if recipe.calibration is not None:
            with phases("sample"):
                samples = work.begin(partial(_calibration_tokens, recipe, source, progress))
        recipe, allocation = _allocate(recipe, source, work, samples, phases, progress)
        exporters = [
            stack.enter_context(open_exporter(export, recipe, source, overwrite)) for export in recipe.options.exports
        ]

        def add(name: str, weight: Weight) -> None:
            _check_finite(name, weight)
            with phases("write"):
                for exporter in exporters:
                    exporter.add(name, weight)

        add(EMBEDDING, _finite(EMBEDDING, source.embedding))
        modules = _quantize_layers(recipe, source, work, samples, add, phases, progress)
        add(FINAL_NORM, _finite(FINAL_NORM, source.final_norm))
        if recipe.head is not None:
            modules.append(_quantize_head(recipe.head, source, add, phases))
        elif not source.config.tie_word_embeddings:
            add(HEAD, _finite(HEAD, source.head))
        manifests = []
        for exporter in exporters:
            seconds = time.monotonic() - started
            manifests.append(
                build_manifest(recipe, source, exporter.export, exporter.size_bytes, modules, seconds, phases)
            )
            manifests[-1] |= {} if allocation is None else {"allocation": allocation}
            exporter.finish(manifests[-1])
    return manifests


def _allocate(
    recipe: Recipe,
    source: ModelSource,
    work: WorkFolder,
    tokens: Tensor | None,
    phases: Phases,
    progress: Progress,
) -> tuple[Recipe, dict[str, Any] | None]:
    """The recipe with the schemes that its budget buys, and what the manifest says of them. None without a budget."""
    mixture = recipe.mixture
    if mixture is None or tokens is None:
        return recipe, None
    backend = ReferenceBackend(recipe.device, products=fast_products(recipe.device))
    with phases("measure sensitivity"):
        allocation = work.once(
            "allocation",
            lambda: mixture.spend(measure(source, tokens, mixture.parts, backend, recipe.options.seed, progress)),
        )
    return replace(recipe, schemes=mixture.schemes(allocation)), allocation


def _quantize_layers(
    recipe: Recipe,
    source: ModelSource,
    work: WorkFolder,
    tokens: Tensor | None,
    add: Callable[[str, Weight], None],
    phases: Phases,
    progress: Progress,
) -> list[ModuleReport]:
    method = recipe.build_method(source.config)
    backend = ReferenceBackend(recipe.device, products=fast_products(recipe.device))
    sweep = None
    if tokens is not None:
        spill = recipe.options.spill
        if spill is None:
            spill = not fit_in_memory(tokens, source.config.hidden_size)
        spill_to = work.spill_file if spill else None
        sweep = CalibrationSweep(source, tokens, backend, method.needs_gram, method.keep_rows, spill_to)
    reports: list[ModuleReport] = []
    for index in range(source.config.num_layers):
        progress(f"quantizing{_last_error(reports)}", index, source.config.num_layers)
        with phases("read"):
            kept = work.load_layer(index)
        result = kept or _quantize_layer(recipe, source, index, method, sweep, phases)
        for name, weight in result.weights.items():
            add(layer_name(index, name), weight)
        if kept is None:
            with phases("write"):
                work.keep_layer(index, result)
        reports += [replace(report, name=layer_name(index, report.name)) for report in result.modules]
        if sweep is not None and index + 1 < source.config.num_layers:
            with phases("advance"):
                sweep.advance(DecoderLayer(source.config, index, result.weights, backend))
    return reports


def _quantize_layer(
    recipe: Recipe, source: ModelSource, index: int, method: Method, sweep: CalibrationSweep | None, phases: Phases
) -> LayerResult:
    with phases("read"):
        given = {name: _finite(layer_name(index, name), weight) for name, weight in source.layer(index).items()}
        weights = {name: as_dense(weight) for name, weight in given.items()}
    with phases("observe"):
        statistics = {} if sweep is None else sweep.observe(DecoderLayer(source.config, index, weights, sweep.backend))
    with phases("choose codes"):
        return method.quantize_layer(weights, recipe.layer_schemes(index), statistics)


def _quantize_head(
    scheme: Scheme, source: ModelSource, add: Callable[[str, Weight], None], phases: Phases
) -> ModuleReport:
    with phases("read"):
        given = _finite(HEAD, source.head)
    with phases("choose codes"):
        head, report = round_head(given, scheme)
    add(HEAD, head)
    return report


def _calibration_tokens(recipe: Recipe, source: ModelSource, progress: Progress) -> Tensor:
    options = recipe.options
    return calibration_tokens(
        str(recipe.calibration), source, options.samples, options.seq_len, options.seed, recipe.device, progress
    )


def _last_error(reports: list[ModuleReport]) -> str:
    """The error of the layer before, for the progress bar."""
    last = [r for r in reports if r.name.split(".")[2] == reports[-1].name.split(".")[2]]
    return f" (last layer's error {sum(r.error for r in last) / len(last):.2%})" if last else ""


def _finite(name: str, weight: Weight) -> Weight:
    """A weight as the model has it. Raises InputError where it holds what no method can work with."""
    if not _is_finite(weight):
        raise InputError(f"{name} of the model holds values that are not finite, NaN or infinity: its file is damaged")
    return weight


def _check_finite(name: str, weight: Weight) -> None:
    if not _is_finite(weight):
        raise LlmoptError(f"{name} came out with values that are not finite; nothing was written")


def _is_finite(weight: Weight) -> bool:
    if isinstance(weight, Tensor):
        return all_finite(weight)
    return all(all_finite(part.float()) for part in (weight.scales, weight.minimums) if part is not None)
