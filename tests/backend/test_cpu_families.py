"""Families whose layers differ from Llama's, on the CPU kernels: right, whichever way they are run."""

import pytest
import torch

from llmopt.engine.batch import build_batch
from llmopt.engine.config import EngineConfig
from llmopt.engine.params import SamplingParams
from llmopt.engine.request import Request
from llmopt.engine.runner import Runner
from llmopt.engine.scheduler import Chunk
from llmopt.model.source import open_source

pytest.importorskip("llmopt.kernels._cpu", reason="the compiled kernels are not built")

UNFUSED = {
    "phi3-longrope": ("longrope",),
    "gemma2": ("gelu_tanh", "norms after", "scaled emb", "scale of attention", "-capped attention", "-capped logits"),
    "gemma3": ("rotations that differ by layer",),
    "mixtral": ("experts",),
    "qwen3-moe": ("experts",),
}
FUSED = ("phi3", "phi3-partial")
BLOCK = 16


def logits(folder, tokens: list[int], dtype: str) -> tuple[Runner, torch.Tensor]:
    """The logits of a prompt in two chunks, then of tokens one by one."""
    config = EngineConfig(model=str(folder), backend="cpu", dtype=dtype, max_num_seqs=4, block_size=BLOCK)
    runner = Runner(open_source(str(folder)), config)
    request = Request("r", tokens, SamplingParams(), seed=0)
    request.blocks = list(range(-(-len(tokens) // BLOCK)))[::-1]
    found = []
    for start, count in ((0, 10), (10, 20), *((i, 1) for i in range(30, len(tokens)))):
        batch = build_batch([Chunk(request, start, count)], BLOCK)
        found.append(runner.logits(runner.hidden(batch)))
    return runner, torch.cat(found)


@pytest.mark.parametrize("family", [*FUSED, *UNFUSED])
def test_equal_to_transformers_where_nothing_is_rounded(family: str, tiny_model) -> None:
    folder, model = tiny_model(family)
    tokens = torch.randint(3, 320, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        truth = model(torch.tensor([tokens])).logits[0]
    _, found = logits(folder, tokens, "float32")
    torch.testing.assert_close(found, truth, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", [*FUSED, *UNFUSED])
def test_close_to_transformers_where_activations_are_rounded(family: str, tiny_model, caplog) -> None:
    folder, model = tiny_model(family)
    tokens = torch.randint(3, 320, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        truth = model(torch.tensor([tokens])).logits[0]
    runner, found = logits(folder, tokens, "auto")
    assert (runner.fused is not None) == (family in FUSED)
    # Of nine tokens in ten: where two experts are nearly as likely, rounding may choose the other.
    assert (found - truth).square().mean(1).sqrt().quantile(0.9) < 0.03 * truth.std()
    warnings = " ".join(record.getMessage() for record in caplog.records)
    for word in UNFUSED.get(family, ()):
        assert word in warnings
    if family == "gemma2":
        assert "attention is compiled without a soft cap" in warnings
