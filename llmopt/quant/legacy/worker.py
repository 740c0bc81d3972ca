"""Runs auto-gptq or autoawq in the environment that holds them: `python worker.py JOB.json`.

This file stands alone, because llmopt is not installed there. A job says:

    package, source, output   auto-gptq or autoawq; the folder of a dense model; the folder to write
    tokens                    lists of token ids, all of one length
    bits, group_size, sym     the grid of codes
    desc_act, damp            GPTQ's settings
    seed

Standard output carries one JSON object a line: `{"progress": [done, total]}` any number of times, counted in linear
layers, then `{"result": ...}`, or `{"error": "one line"}` and exit status 1. What the packages print goes to standard
error.
"""

import json
import os
import platform
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SPOILED = (
    "a zero point of 0, which auto-gptq cannot store: it wrote wrong ones there and into what follows in the same word"
)


class Channel:
    """Standard output, kept for messages: what is printed from now on goes to standard error."""

    def __init__(self) -> None:
        self.file = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def send(self, **message: Any) -> None:
        self.file.write(json.dumps(message) + "\n")
        self.file.flush()


class Modules:
    """The reports of the linear layers that are done, each sent on as progress."""

    def __init__(self, channel: Channel, source: str) -> None:
        self.channel = channel
        self.layers = json.loads(Path(source, "config.json").read_text())["num_hidden_layers"]
        self.reports: list[dict[str, Any]] = []

    def add(self, name: str, before: Tensor, after: Tensor, gram: Tensor, note: str | None = None) -> None:
        """Take in a weight [out, in] before and after, and the gram matrix [in, in] of its inputs, to any scale."""
        change = after.float() - before
        error = float((change @ gram * change).sum() / (before @ gram * before).sum().clamp(min=1e-30))
        self.reports.append({"name": name, "error": error, "note": note})
        self.channel.send(progress=[len(self.reports), 7 * self.layers])


def run_auto_gptq(job: dict[str, Any], modules: Modules) -> None:
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig  # type: ignore[import-not-found]
    from auto_gptq.quantization import GPTQ  # type: ignore[import-not-found]

    settings = BaseQuantizeConfig(
        bits=job["bits"],
        group_size=job["group_size"],
        damp_percent=job["damp"],
        desc_act=job["desc_act"],
        sym=job["sym"],
        model_file_base_name="model",
    )
    model = AutoGPTQForCausalLM.from_pretrained(job["source"], settings)
    names = {module: name for name, module in model.model.named_modules()}
    quantize = GPTQ.fasterquant

    def observed(self: Any, *args: Any, **kwargs: Any) -> Any:
        before, hessian = self.layer.weight.data.float(), self.H.clone()  # the package damps its own in place
        scale, zero, g_idx = quantize(self, *args, **kwargs)
        note = SPOILED if bool((zero == 0).any()) else None
        modules.add(names[self.layer], before, self.layer.weight.data, hessian, note)
        return scale, zero, g_idx

    GPTQ.fasterquant = observed
    model.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job["tokens"]])
    model.save_quantized(job["output"], use_safetensors=True)


def run_autoawq(job: dict[str, Any], modules: Modules) -> None:
    if not torch.cuda.is_available():
        # It would run all the same, but its search restores weights from aliases of what it scaled in place.
        raise OSError("autoawq quantizes on CUDA only: without it, it writes a broken model")
    from awq import AutoAWQForCausalLM  # type: ignore[import-not-found]
    from awq.quantize.quantizer import AwqQuantizer  # type: ignore[import-not-found]

    class Observed(AwqQuantizer):
        layer = 0

        def _search_best_clip(self, layer: Any, named_linears: Any, input_feat: Any) -> Any:
            # By now weights and inputs are scaled, and nothing is clipped or rounded yet.
            self.truth = {name: linear.weight.data.float().clone() for name, linear in named_linears.items()}
            self.inputs = input_feat
            return super()._search_best_clip(layer, named_linears, input_feat)

        def _apply_quant(self, module: Any, named_linears: Any) -> None:
            super()._apply_quant(module, named_linears)
            for name, linear in named_linears.items():
                gram = gram_matrix(self.inputs[name])
                before, after = (w.to(gram.device) for w in (self.truth[name], linear.weight.data))
                modules.add(f"model.layers.{self.layer}.{name}", before, after, gram)
            self.layer += 1

    model = AutoAWQForCausalLM.from_pretrained(job["source"], torch_dtype=torch.float16, trust_remote_code=False)
    grid = {"w_bit": job["bits"], "q_group_size": job["group_size"], "zero_point": not job["sym"], "version": "GEMM"}
    model.quantize(
        quant_config=grid,
        calib_data=job["tokens"],
        max_calib_samples=len(job["tokens"]),
        max_calib_seq_len=len(job["tokens"][0]),
        quantizer_cls=Observed,
    )
    model.save_quantized(job["output"], safetensors=True)


def gram_matrix(inputs: Tensor) -> Tensor:
    """float32 [in, in], the sum of x xᵀ over inputs [samples, tokens, in]."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gram = torch.zeros(inputs.shape[-1], inputs.shape[-1], device=device)
    for sample in inputs:
        x = sample.to(device).float()
        gram.addmm_(x.T, x)
    return gram


def main(job_file: str) -> None:
    channel = Channel()

    def report(kind: Any, error: Any, traceback: Any) -> None:
        lines = str(error).strip().splitlines() or ["no reason given"]
        channel.send(error=f"{kind.__name__}: {lines[0]}")
        sys.__excepthook__(kind, error, traceback)

    sys.excepthook = report
    job = json.loads(Path(job_file).read_text())
    started = time.monotonic()
    torch.manual_seed(job["seed"])
    modules = Modules(channel, job["source"])
    package = job["package"]
    {"auto-gptq": run_auto_gptq, "autoawq": run_autoawq}[package](job, modules)
    channel.send(
        result={
            "modules": modules.reports,
            "seconds": round(time.monotonic() - started, 3),
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux counts in KiB
            "versions": {
                **{name: version(name) for name in (package, "torch", "transformers")},
                "python": platform.python_version(),
            },
        }
    )


if __name__ == "__main__":
    main(sys.argv[1])
