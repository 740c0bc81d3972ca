"""`--quantizer auto-gptq|autoawq`: the original packages, run in an environment of their own.

It is how an old artifact is made again, and what the native methods are compared with. The packages are given the
same model in float16 and the same calibration tokens; the codes in the artifact are theirs, to the bit.
"""

import json
import math
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmopt.errors import InputError, LlmoptError
from llmopt.model.architectures import config_to_hf
from llmopt.model.config import ModelConfig
from llmopt.model.decoder import linear_names
from llmopt.model.source import FolderSource, ModelSource, as_dense, layer_name
from llmopt.progress import Progress, silent
from llmopt.quant.export import MANIFEST, check_output, finish_folder, parameter_order
from llmopt.quant.legacy.environment import environment_python
from llmopt.quant.manifest import build_manifest
from llmopt.quant.methods.base import ModuleReport
from llmopt.quant.phases import Phases
from llmopt.quant.recipe import Recipe
from llmopt.weights.artifact import ArtifactFolder
from llmopt.weights.checkpoint import SafetensorsCheckpoint
from llmopt.weights.quantized import QuantizedTensor
from llmopt.weights.scheme import PER_CHANNEL
from llmopt.weights.shards import ShardWriter

ENVIRONMENT = "auto-gptq-autoawq"  # both live in one
WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True)
class Package:
    """What a package does, as far as it is known before it runs.

    Attributes:
        method: also the name of the format that it writes.
        families: the architectures that it knows, of those that are known here.
        multiple: the outputs of every linear layer must be a multiple of this.
        whole_rows: it can form one group of a whole row.
    """

    method: str
    families: tuple[str, ...]
    multiple: int
    whole_rows: bool


PACKAGES = {
    "auto-gptq": Package("gptq", ("llama", "mistral", "qwen2"), multiple=32, whole_rows=True),
    "autoawq": Package("awq", ("llama", "mistral", "qwen2", "qwen3"), multiple=64, whole_rows=False),
}


def check_quantizer(recipe: Recipe, config: ModelConfig) -> None:
    """Refuse at once what the recipe's quantizer would fail at later; the native one is never refused.

    Raises LlmoptError where a package is to run and torch sees no CUDA device, and InputError for what it cannot do.
    """
    name = recipe.options.quantizer
    if name not in PACKAGES:
        return
    package = PACKAGES[name]
    native = f"use --quantizer native --method {package.method}, which writes the same format"
    if not torch.cuda.is_available():
        raise LlmoptError(f"{name} quantizes on CUDA only, and torch sees no CUDA device here: {native}")
    if recipe.device != "cuda":
        raise InputError(f"{name} quantizes on CUDA only: leave out --device {recipe.device}, or {native}")
    formats = [export.format for export in recipe.options.exports]
    if (recipe.options.method, formats) != (package.method, [package.method]):
        raise InputError(f"{name} is --method {package.method} and writes one artifact of --format {package.method}")
    if set(recipe.modules) != set(linear_names(config)) or set(recipe.schemes.values()) != {recipe.main}:
        raise InputError(
            f"{name} quantizes all linear layers by one scheme, without --ignore, overrides or --head: {native}"
        )
    if config.architecture not in package.families:
        raise InputError(f"{name} does not know {config.architecture}, only {', '.join(package.families)}: {native}")
    if recipe.main.group_size == PER_CHANNEL and not package.whole_rows:
        raise InputError(f"{name} needs a --group-size above 0, -1 is not possible")
    for layer, shape in config.layer_shapes(0).items():
        if len(shape) == 2 and shape[0] % package.multiple:
            raise InputError(f"{name} needs outputs in multiples of {package.multiple}, {layer} has {shape[0]}")


def quantize_with_package(
    recipe: Recipe,
    source: ModelSource,
    tokens: Tensor,
    phases: Phases,
    *,
    started: float,
    overwrite: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write an artifact by the package that the recipe names as its quantizer.

    Args:
        recipe: one that `check_quantizer` lets pass; it is asked again.
        tokens: int64 [samples, length] to calibrate on.
        phases: takes the time of what is done here.
        started: time.monotonic() when the command began, which the manifest's `seconds` count from.

    Returns the manifest. Beyond that of a native quantization it holds `quantizer`: the package's name, its own
    seconds and the versions in its environment. Raises InputError and LlmoptError; then nothing is written.
    """
    check_quantizer(recipe, source.config)
    name = recipe.options.quantizer
    export = recipe.options.exports[0]
    check_output(export.output, source)
    with ArtifactFolder(export.output, overwrite, marker=MANIFEST) as folder:
        with phases("make the environment"):
            python = environment_python(ENVIRONMENT, progress=progress)
        work = folder / "work"
        work.mkdir()
        with phases("write the source"):
            write_dense(source, work / "source", progress)
        job = work / "job.json"
        job.write_text(json.dumps(_job(recipe, tokens, work)))
        with phases("choose codes"):
            result = run_worker(python, job, name, progress)
        quantization = _take_weights(work / "output", folder, name)
        shutil.rmtree(work)
        reports = [ModuleReport(m["name"], recipe.options.method, m["error"], m["note"]) for m in result["modules"]]
        seconds = time.monotonic() - started
        manifest = build_manifest(recipe, source, export, _size(folder), reports, seconds, phases)
        manifest["peak_rss_bytes"] = max(manifest["peak_rss_bytes"], result["peak_rss_bytes"])
        manifest["quantizer"] = {"name": name, "seconds": result["seconds"], "versions": result["versions"]}
        finish_folder(source, folder, "float16", quantization, manifest)
        _check_artifact(folder, name)
    return manifest


def write_dense(source: ModelSource, folder: Path, progress: Progress = silent) -> None:
    """Write a model, whatever it comes as, as a folder that transformers 4 loads: float16, without a tokenizer."""
    folder.mkdir()
    order = parameter_order(source)
    shards = ShardWriter(folder)
    for done, (name, shape) in enumerate(order.items()):
        progress("writing the model in float16", done, len(order))
        shards.add(name, as_dense(source.checked(name, shape), torch.float16))
    shards.close()
    (folder / "config.json").write_text(json.dumps(config_to_hf(source.config) | {"torch_dtype": "float16"}))


def run_worker(python: Path, job: Path, package: str, progress: Progress = silent) -> dict[str, Any]:
    """Run `worker.py` on a job and give its result. Raises LlmoptError, with the place of its log, where it fails."""
    descriptor, log = tempfile.mkstemp(prefix=f"llmopt-{package}-", suffix=".log")
    # Isolated, so that neither this folder nor PYTHONPATH puts its own modules before the environment's.
    command = [str(python), "-I", str(WORKER), str(job)]
    variables = os.environ | {"HF_HUB_OFFLINE": "1"}
    last: dict[str, Any] = {}
    with (
        os.fdopen(descriptor, "w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=variables) as process,
    ):
        try:
            progress(f"loading {package}", 0, 1)
            for line in process.stdout or ():
                last = _message(line)
                if "progress" in last:
                    progress(f"quantizing by {package}", *last["progress"])
            process.wait()
        finally:
            process.kill()  # only where this process is interrupted: one that has ended is let be
    if process.returncode != 0 or "result" not in last:
        reason = last.get("error", f"it ended with status {process.returncode} and gave no reason")
        raise LlmoptError(f"{package} failed: {reason} (its whole log: {log})")
    Path(log).unlink()
    return last["result"]


def _message(line: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError:  # cut off, where the worker was killed
        return {}


def _job(recipe: Recipe, tokens: Tensor, work: Path) -> dict[str, Any]:
    return {
        "package": recipe.options.quantizer,
        "source": str(work / "source"),
        "output": str(work / "output"),
        "tokens": tokens.tolist(),
        "bits": recipe.main.bits,
        "group_size": recipe.main.group_size,
        "sym": recipe.main.symmetric,
        "desc_act": recipe.options.desc_act,
        "damp": recipe.options.damp,
        "seed": recipe.options.seed,
    }


def _take_weights(output: Path, folder: Path, quantizer: str) -> dict[str, Any]:
    """Move the package's safetensors into the artifact's folder, and give the `quantization_config` it wrote."""
    for file in output.glob("model*.safetensors*"):
        file.chmod(0o644)  # safetensors makes files that only their owner can read
        file.rename(folder / file.name)
    try:
        return json.loads((output / "config.json").read_text())["quantization_config"]
    except (OSError, ValueError, KeyError) as error:
        raise LlmoptError(f"{quantizer} left no config.json with a quantization_config: {error}") from error


def _size(folder: Path) -> int:
    """Bytes of all tensors, as the native manifest counts them."""
    checkpoint = SafetensorsCheckpoint(folder)
    return sum(math.prod(checkpoint.shape(name)) * checkpoint.dtype(name).itemsize for name in checkpoint.names())


def _check_artifact(folder: Path, quantizer: str) -> None:
    """Read the artifact as a user's engine will. Raises LlmoptError where a linear layer is not what was asked for."""
    made = FolderSource(folder)
    modules = frozenset(linear_names(made.config))
    for index in range(made.config.num_layers):
        for name, weight in made.layer(index).items():
            full = layer_name(index, name)
            quantized = isinstance(weight, QuantizedTensor)
            if quantized != (full.removesuffix(".weight") in modules):
                raise LlmoptError(f"{quantizer} wrote {full} {'quantized' if quantized else 'in floating point'}")
            if not torch.isfinite(as_dense(weight)).all():
                raise LlmoptError(f"{quantizer} wrote values into {full} that are not finite")
