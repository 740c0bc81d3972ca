"""Artifacts in FP4 and FP8 of the real model: the CPU kernels run them whole and predict what the reference does."""

from pathlib import Path

import pytest
import torch

import llmopt
from llmopt.engine.config import EngineConfig
from llmopt.engine.scoring import Scorer
from llmopt.evaluate.divergence import compare
from llmopt.evaluate.text import cut_windows, read_text

pytest.importorskip("llmopt.kernels._cpu", reason="the compiled kernels are not built")
pytestmark = pytest.mark.model

CTX = 256
MOST_KL = 0.004  # rounding activations to 8 bits costs 0.0013 (NVFP4) and 0.0028 (MXFP4) on WikiText-2


@pytest.fixture
def artifact(smollm2: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    folder = tmp_path / request.param
    llmopt.quantize(smollm2, str(folder), method="rtn", scheme=request.param, format="compressed-tensors")
    return str(folder)


def scorer(model: str, backend: str) -> Scorer:
    return Scorer(EngineConfig(model=model, backend=backend, max_model_len=CTX, dtype="auto"))


def mean_kl(truth: Scorer, other: Scorer) -> float:
    (tokens,) = cut_windows(truth.tokenizer, read_text(None), CTX, 1).tokens
    expected, found = (torch.cat(list(one.logits(tokens)))[:-1] for one in (truth, other))
    return float(compare(expected, found, torch.tensor(tokens[1:])).kl.mean())


@pytest.mark.parametrize("artifact", ["nvfp4", "mxfp4"], indirect=True)
def test_fp4_runs_as_one_operation_and_close_to_the_reference(artifact: str) -> None:
    ours = scorer(artifact, "cpu")
    assert ours.runner.fused is not None
    assert mean_kl(scorer(artifact, "reference"), ours) <= MOST_KL


@pytest.mark.parametrize("artifact", ["fp8"], indirect=True)
def test_fp8_runs_as_one_operation_and_as_close_to_the_reference_as_can_be(artifact: str) -> None:
    """Where a scheme rounds activations, the last bits of a sum decide which way some are rounded, and after a few
    layers all of them are rounded otherwise. So the reference is as far from itself once its embeddings are off by
    one part in a million, and no implementation can be nearer to it."""
    ours, truth, disturbed = (scorer(artifact, backend) for backend in ("cpu", "reference", "reference"))
    assert ours.runner.fused is not None
    decoder = disturbed.runner.decoder
    noise = torch.randn(decoder.embedding.shape, generator=torch.Generator().manual_seed(1))
    decoder.embedding = decoder.embedding * (1 + 1e-6 * noise)
    assert mean_kl(truth, ours) <= 1.3 * mean_kl(truth, disturbed)
