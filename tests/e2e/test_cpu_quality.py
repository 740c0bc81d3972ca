"""Every format that is written, of the real model: the CPU kernels run it whole and predict what the reference does.

`make test` takes one format for each kind of weight that the kernels know, on one window of the built-in text. `make
quality-cpu` takes all, on more and longer windows, and prints what it found.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import llmopt
from llmopt.engine.config import EngineConfig
from llmopt.engine.scoring import Scorer
from llmopt.evaluate.divergence import compare
from llmopt.evaluate.text import cut_windows, read_text
from llmopt.model.source import ModelSource, open_source

pytest.importorskip("llmopt.kernels._cpu", reason="the compiled kernels are not built")
pytestmark = pytest.mark.model

WINDOWS = int(os.environ.get("QUALITY_WINDOWS", "1"))
CTX = int(os.environ.get("QUALITY_CTX", "512"))
TEXT = os.environ.get("QUALITY_TEXT")  # a file; the built-in text without one
MOST_KL = 0.004  # where activations are rounded to 8 bits
MOST_KL_FLOAT32 = 0.0002  # where they are not
CHAOS = 1.3  # times what the reference is from itself, disturbed


@dataclass(frozen=True)
class Case:
    """A format and a scheme, and whether it is among the few for every day."""

    format: str
    scheme: str
    daily: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.format}-{self.scheme}"


GROUPS_OF_64 = {"group_size": 64}
CLOSE = [
    *(
        Case("gguf", name)
        for name in ("f16", "q8_0", "q6_k", "q5_k_m", "q4_k_s", "q4_0", "q4_1", "q5_0", "q5_1", "mxfp4")
    ),
    Case("gguf", "bf16", daily=True),
    Case("gguf", "q4_k_m", daily=True),  # codes of 4, 6 and 8 bits, minimums, scales on two levels
    Case("gptq", "w4a16", daily=True, options=GROUPS_OF_64),
    Case("gptq", "w4a16-asym", options=GROUPS_OF_64),
    Case("gptq", "w3a16", options=GROUPS_OF_64),
    Case("gptq", "w2a16", options=GROUPS_OF_64),
    Case("gptq", "w8a16", options=GROUPS_OF_64),
    Case("awq", "w4a16-asym", daily=True, options=GROUPS_OF_64),  # zero points
    Case("compressed-tensors", "w4a16", options=GROUPS_OF_64),
    Case("compressed-tensors", "w8a16"),
    Case("compressed-tensors", "nvfp4", daily=True),
    Case("compressed-tensors", "mxfp4"),
]
ROUNDING = [  # activations, as part of the scheme
    Case("compressed-tensors", "w8a8", daily=True),
    Case("compressed-tensors", "fp8", daily=True),
    Case("compressed-tensors", "w8a8", options={"method": "smoothquant", "calibration": "builtin", "samples": 16}),
]


def parameters(cases: list[Case]) -> list:
    return [
        pytest.param(
            case,
            id="-".join([case.name, *map(str, case.options.values())]),
            marks=[] if case.daily else pytest.mark.slow,
        )
        for case in cases
    ]


def written(smollm2: str, folder: Path, case: Case) -> ModelSource:
    output = folder / ("model.gguf" if case.format == "gguf" else "model")
    llmopt.quantize(
        smollm2, str(output), **{"method": "rtn", "scheme": case.scheme, "format": case.format, **case.options}
    )
    return open_source(str(output))


def scorer(source: ModelSource, backend: str, dtype: str = "auto") -> Scorer:
    return Scorer(EngineConfig(model=str(source.path), backend=backend, max_model_len=CTX, dtype=dtype), source)


def disturbed(source: ModelSource) -> Scorer:
    """The reference with embeddings that are off by one part in a million."""
    result = scorer(source, "reference")
    decoder = result.runner.decoder
    noise = torch.randn(decoder.embedding.shape, generator=torch.Generator().manual_seed(1))
    decoder.embedding = decoder.embedding * (1 + 1e-6 * noise)
    return result


def mean_kl(source: ModelSource, others: dict[str, Scorer], case: Case) -> dict[str, float]:
    """Of each from the reference, nats a token; every second position, since neighbours tell much the same."""
    truth = scorer(source, "reference")
    kl: dict[str, list[torch.Tensor]] = {name: [] for name in others}
    for tokens in cut_windows(truth.tokenizer, read_text(TEXT), CTX, WINDOWS).tokens:
        for expected, *found in zip(
            truth.logits(tokens), *(one.logits(tokens) for one in others.values()), strict=True
        ):
            for name, logits in zip(others, found, strict=True):
                targets = torch.zeros(len(expected[::2]), dtype=torch.int64)
                kl[name].append(torch.from_numpy(compare(expected[::2], logits[::2], targets).kl))
    means = {name: float(torch.cat(parts).mean()) for name, parts in kl.items()}
    print(f"{case.name:30}", "  ".join(f"{name} {value:.5f}" for name, value in means.items()))
    return means


@pytest.mark.parametrize("case", parameters(CLOSE))
def test_the_kernels_predict_what_the_reference_does(smollm2: str, tmp_path: Path, case: Case) -> None:
    source = written(smollm2, tmp_path, case)
    others = {dtype: scorer(source, "cpu", dtype) for dtype in ("auto", "float32")}
    assert others["auto"].runner.fused is not None
    kl = mean_kl(source, others, case)
    assert kl["auto"] <= MOST_KL
    assert kl["float32"] <= MOST_KL_FLOAT32


@pytest.mark.parametrize("case", parameters(ROUNDING))
def test_where_a_scheme_rounds_activations_they_are_as_close_as_can_be(
    smollm2: str, tmp_path: Path, case: Case
) -> None:
    """The last bits of a sum decide which way some activations are rounded, and after a few layers all of them are
    rounded otherwise. So the reference is as far from itself once its embeddings are off by one part in a million, and
    no implementation can be nearer to it."""
    source = written(smollm2, tmp_path, case)
    others = {dtype: scorer(source, "cpu", dtype) for dtype in ("auto", "float32")}
    assert others["auto"].runner.fused is not None
    kl = mean_kl(source, {**others, "disturbed": disturbed(source)}, case)
    assert max(kl["auto"], kl["float32"]) <= CHAOS * kl["disturbed"]
