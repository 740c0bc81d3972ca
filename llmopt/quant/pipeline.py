"""Quantizes a model layer by layer: read, calibrate, choose codes, write, forget."""

import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from llmopt.backend.reference import ReferenceBackend
from llmopt.errors import LlmoptError
from llmopt.model.decoder import LINEAR_GROUPS, DecoderLayer
from llmopt.model.source import EMBEDDING, FINAL_NORM, HEAD, ModelSource, as_dense, layer_name, open_source
from llmopt.progress import Progress, silent
from llmopt.quant.calibration import CalibrationSweep
from llmopt.quant.export import Exporter, open_exporter
from llmopt.quant.manifest import build_manifest
from llmopt.quant.methods.base import LayerResult, ModuleReport
from llmopt.quant.recipe import Recipe, resolve
from llmopt.quant.samples import calibration_tokens
from llmopt.weights.quantized import QuantizedTensor, Weight


def quantize(
    model: str,
    output: str,
    *,
    method: str = "gptq",
    scheme: str = "w4a16",
    format: str | None = None,
    group_size: int | None = None,
    desc_act: bool = False,
    damp: float = 0.01,
    ignore: tuple[str, ...] = (),
    calibration: str = "self",
    samples: int = 64,
    seq_len: int = 512,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write a quantized copy of a model; the arguments are the flags of `llmopt quantize`.

    Returns the result as `llmopt quantize --json` documents it. Raises InputError for options that do not go together
    and LlmoptError where it cannot be done; then there is nothing under `output`.
    """
    started = time.monotonic()
    source = open_source(model)
    recipe = resolve(
        source.config,
        model=model,
        output=output,
        method=method,
        scheme=scheme,
        format=format,
        group_size=group_size,
        desc_act=desc_act,
        damping=damp,
        ignore=tuple(ignore),
        calibration=calibration,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        device=device,
    )
    torch.manual_seed(seed)
    with open_exporter(recipe, source, overwrite) as exporter, torch.inference_mode():
        exporter.add(EMBEDDING, source.embedding)
        modules = _quantize_layers(recipe, source, exporter, progress)
        exporter.add(FINAL_NORM, source.final_norm)
        if not source.config.tie_word_embeddings:
            exporter.add(HEAD, source.head)
        manifest = build_manifest(recipe, source, modules, time.monotonic() - started, exporter.size_bytes)
        exporter.finish(manifest)
    return manifest


def _quantize_layers(recipe: Recipe, source: ModelSource, exporter: Exporter, progress: Progress) -> list[ModuleReport]:
    method = recipe.build_method()
    backend = ReferenceBackend(recipe.device)
    sweep = None
    if method.needs_calibration:
        tokens = calibration_tokens(
            recipe.calibration, source, recipe.samples, recipe.seq_len, recipe.seed, recipe.device, progress
        )
        sweep = CalibrationSweep(source, tokens, backend)
    reports: list[ModuleReport] = []
    for index in range(source.config.num_layers):
        progress(f"quantizing{_last_error(reports)}", index, source.config.num_layers)
        weights = {name: as_dense(weight) for name, weight in source.layer(index).items()}
        if recipe.scheme.is_dense:
            result = LayerResult(dict(weights))
        else:
            statistics = {} if sweep is None else sweep.observe(DecoderLayer(source.config, index, weights, backend))
            skip = frozenset(
                m for group in LINEAR_GROUPS.values() for m in group if recipe.ignores(layer_name(index, m))
            )
            result = method.quantize_layer(weights, recipe.scheme, statistics, skip)
        for name, weight in result.weights.items():
            _check_finite(layer_name(index, name), weight)
            exporter.add(layer_name(index, name), weight)
        if sweep is not None and index + 1 < source.config.num_layers:
            sweep.advance(DecoderLayer(source.config, index, result.weights, backend))
        reports += [_named(report, layer_name(index, report.name)) for report in result.modules]
    return reports


def _named(report: ModuleReport, name: str) -> ModuleReport:
    return ModuleReport(**(asdict(report) | {"name": name}))


def _last_error(reports: list[ModuleReport]) -> str:
    """The error of the layer before, for the progress bar."""
    last = reports[-7:]
    return f" (last layer's error {sum(r.error for r in last) / len(last):.2%})" if last else ""


def _check_finite(name: str, weight: Weight) -> None:
    tensor: Tensor = weight.scales if isinstance(weight, QuantizedTensor) else weight
    if not torch.isfinite(tensor).all():
        raise LlmoptError(f"{name} came out with values that are not finite; nothing was written")
