"""What a quantization will do, found out before anything runs; everything that it would be refused for, is refused
here in the same words.

`check` is cheap, and a quantization begins with it. `make_plan` is `--dry-run`: it also reads the calibration text,
measures the machine for a second and estimates.
"""

import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any

import psutil
import torch

from llmopt.backend.select import fast_products
from llmopt.errors import InputError, LlmoptError
from llmopt.model.source import ModelSource, open_source
from llmopt.model.tokenizer_files import write_tokenizer
from llmopt.progress import Progress, silent
from llmopt.quant.estimate import estimate_memory, estimate_seconds, layer_weights, measure_rates
from llmopt.quant.export import MANIFEST, FolderExporter, GGUFExporter, check_output, parameter_order
from llmopt.quant.legacy.run import check_quantizer
from llmopt.quant.methods.rtn import round_to_nearest
from llmopt.quant.options import Export, Options
from llmopt.quant.recipe import GGUF, Recipe, resolve
from llmopt.quant.samples import SELF, calibration_tokens
from llmopt.quant.work import WorkFolder
from llmopt.weights.artifact import ArtifactFile, ArtifactFolder
from llmopt.weights.scheme import Scheme
from llmopt.weights.shards import SHARD_BYTES

VERSION = 1
PACKED_ROWS = 32  # whatever the width of a code, so many rows of them fill whole words
CANNOT_SEE = "values are not looked at: NaN and infinity come to light when a layer is read"


@dataclass(frozen=True)
class Disk:
    """A file system that is written to.

    Attributes:
        path: the folder that stands for it.
        needed, free: bytes, at the moment when most is needed.
    """

    path: str
    needed: int
    free: int


@dataclass(frozen=True)
class PlannedExport:
    """One artifact; `size_bytes` is that of its weights, exactly."""

    output: str
    format: str
    size_bytes: int


@dataclass(frozen=True)
class Plan:
    """What will be done.

    Attributes:
        recipe: the options, settled.
        parameters: of the whole model.
        schemes: how many linear layers, and the head where it is one of them, get which scheme.
        memory: bytes at the peak by what takes them, an estimate.
        memory_available: bytes that this machine has to give now.
        seconds: by phase, an estimate.
        notes: what a user should know beside all this.
    """

    recipe: Recipe
    parameters: int
    schemes: dict[str, int]
    exports: tuple[PlannedExport, ...]
    disks: tuple[Disk, ...]
    memory: dict[str, int]
    memory_available: int
    seconds: dict[str, float]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """What `--dry-run --json` writes."""
        return {
            "version": VERSION,
            "recipe": self.recipe.to_dict(),
            "parameters": self.parameters,
            "schemes": self.schemes,
            "exports": [asdict(export) for export in self.exports],
            "disks": [asdict(disk) for disk in self.disks],
            "memory_bytes": sum(self.memory.values()),
            "memory": self.memory,
            "memory_available_bytes": self.memory_available,
            "seconds": round(sum(self.seconds.values()), 1),
            "phases": {phase: round(seconds, 1) for phase, seconds in self.seconds.items()},
            "notes": list(self.notes),
        }


def make_plan(options: Options, overwrite: bool = False, resume: bool = False, progress: Progress = silent) -> Plan:
    """The plan of `pipeline.run` with the same arguments. Raises what that would raise before its first layer, except
    for what only a GPU or the lack of one would tell."""
    source = open_source(options.model)
    recipe = resolve(options, source.config)
    check_quantizer(recipe, source.config)
    exports, disks = check(recipe, source, overwrite)
    WorkFolder(recipe, source, resume, overwrite).check_kept()
    with tempfile.TemporaryDirectory() as folder:  # what cannot be written is known once it has been written
        write_tokenizer(source, Path(folder))
    reading = _read_calibration(recipe, source, progress)
    resident = psutil.Process().memory_info().rss
    progress("measuring this machine", 0, 1)
    products = fast_products(recipe.device)
    with torch.inference_mode():
        seconds = reading | estimate_seconds(recipe, source, measure_rates(products))
    memory = {"Python, torch and the tokenizer": resident, **estimate_memory(recipe, source, products)}
    available = psutil.virtual_memory().available + resident
    return Plan(
        recipe=recipe,
        parameters=sum(prod(shape) for shape in parameter_order(source).values()),
        schemes=dict(Counter(scheme.name for scheme in recipe.modules.values())),
        exports=exports,
        disks=disks,
        memory=memory,
        memory_available=available,
        seconds=seconds,
        notes=tuple(_notes(recipe, sum(memory.values()), available)),
    )


def check(recipe: Recipe, source: ModelSource, overwrite: bool) -> tuple[tuple[PlannedExport, ...], tuple[Disk, ...]]:
    """Check every shape, the outputs and the disks, reading no more than headers; returns what will be written.

    Raises InputError for a parameter that is missing or of another shape than the config says, for an output that is
    taken or that the format cannot hold, and LlmoptError where a disk is too small.
    """
    for name, shape in parameter_order(source).items():
        source.check_shape(name, shape)
    for export in recipe.options.exports:
        check_output(export.output, source)
        # Not entered, they do no more than look whether the output is free.
        if export.format == GGUF:
            ArtifactFile(export.output, overwrite)
        else:
            ArtifactFolder(export.output, overwrite, marker=MANIFEST)
        _check_folder(export.output)
    exports = tuple(
        PlannedExport(export.output, str(export.format), _written_bytes(export, recipe, source))
        for export in recipe.options.exports
    )
    return exports, _check_disks(exports, recipe, source)


def _check_folder(output: str) -> None:
    """Raise InputError where the folder of an output cannot be made or written to."""
    above = _existing(output)
    if not above.is_dir():
        raise InputError(f"cannot write to {Path(output).expanduser().resolve()}: {above} is a file")
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"cannot write to {Path(output).expanduser().resolve()}: Permission denied")


def _existing(output: str) -> Path:
    """The nearest folder above an output that exists."""
    return next(path for path in Path(output).expanduser().resolve().parents if path.exists())


def _written_bytes(export: Export, recipe: Recipe, source: ModelSource) -> int:
    """Bytes of an artifact's weights; also has the format say what it cannot hold."""
    if export.format == GGUF:
        written = GGUFExporter(export, recipe, source, BytesIO()).size_bytes
    else:
        exporter = FolderExporter(export, recipe, source, Path(export.output))
        modules: dict[tuple[Scheme, tuple[int, ...]], int] = {}
        written = 0
        for name, (shape, scheme) in exporter.written().items():
            if scheme is None:
                written += prod(shape) * exporter.dtype.itemsize
                continue
            if (scheme, shape) not in modules:
                modules[scheme, shape] = _module_bytes(exporter, name.removesuffix(".weight"), scheme, shape)
            written += modules[scheme, shape]
    if recipe.mixture is not None:  # whatever its parts get, they get no more than the budget together
        written += recipe.mixture.budget // 8 - _stored_bits(recipe, source) // 8
    return written


def _module_bytes(exporter: FolderExporter, module: str, scheme: Scheme, shape: tuple[int, ...]) -> int:
    """Of a linear layer as the format writes it, which is told from some of its rows."""
    rows, width = shape
    few = PACKED_ROWS + rows % PACKED_ROWS  # with the same rest, so that what does not fill words is refused

    def encoded(count: int) -> int:
        weight = round_to_nearest(torch.zeros(count, width), scheme)
        return sum(tensor.nbytes for tensor in exporter.format.encode(module, weight).values())

    more = encoded(few + PACKED_ROWS) - encoded(few)
    return encoded(few) + (rows - few) // PACKED_ROWS * more


def _stored_bits(recipe: Recipe, source: ModelSource) -> int:
    total = 0.0
    for name, scheme in recipe.schemes.items():
        shape = source.config.linear_shape(name)
        total += prod(shape) * scheme.stored_bits(shape[1])
    return round(total)


def _check_disks(exports: Iterable[PlannedExport], recipe: Recipe, source: ModelSource) -> tuple[Disk, ...]:
    """What each file system must hold. Raises LlmoptError where one is too small."""
    needed: Counter[int] = Counter()
    folders: dict[int, Path] = {}
    for number, export in enumerate(exports):
        folder = _existing(export.output)
        device = folder.stat().st_dev
        folders.setdefault(device, folder)
        needed[device] += export.size_bytes
        if export.format != GGUF:  # a shard is written twice, because its header is known only at its end
            needed[device] += min(export.size_bytes, SHARD_BYTES)
        if number == 0 and recipe.calibration is not None:  # finished layers are kept, one byte a code
            needed[device] += sum(layer_weights(source.config))
    disks = tuple(
        Disk(str(folder), needed[device], shutil.disk_usage(folder).free) for device, folder in folders.items()
    )
    for disk in disks:
        if disk.needed > disk.free:
            raise LlmoptError(
                f"{disk.needed / 1e6:.1f} MB are to be written under {disk.path}, and {disk.free / 1e6:.1f} MB are "
                "free there: make room, or choose another output"
            )
    return disks


def _read_calibration(recipe: Recipe, source: ModelSource, progress: Progress) -> dict[str, float]:
    """Read the calibration text, which must be there and be long enough; gives the time, where there is one."""
    if recipe.calibration in (None, SELF):
        return {}
    options = recipe.options
    started = time.monotonic()
    calibration_tokens(
        str(recipe.calibration), source, options.samples, options.seq_len, options.seed, recipe.device, progress
    )
    return {"sample": time.monotonic() - started}


def _notes(recipe: Recipe, memory: int, available: int) -> Iterable[str]:
    yield CANNOT_SEE
    if memory > available:
        yield "more memory is needed than is free: give fewer --samples or a shorter --seq-len, or end other programs"
    if recipe.device == "cuda":
        yield "the time is estimated for the CPU; on the GPU calibration is faster"
    if recipe.mixture is not None:
        yield "the time to measure sensitivity is not in the estimate, and the schemes are those it begins with"
    if recipe.options.quantizer != "native":
        yield f"the time is the native method's; that of {recipe.options.quantizer} is not known"
