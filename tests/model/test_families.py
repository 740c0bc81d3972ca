"""Every family's logits equal transformers' on the same random weights, however the tokens are cut into steps."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from llmopt.backend.reference import ReferenceBackend
from llmopt.engine.batch import build_batch
from llmopt.engine.config import EngineConfig
from llmopt.engine.params import SamplingParams
from llmopt.engine.request import Request
from llmopt.engine.runner import Runner
from llmopt.engine.scheduler import Chunk
from llmopt.model.config import Rope
from llmopt.model.source import ModelSource, open_source

FAMILIES = (
    "llama",
    "llama3-rope",
    "mistral-window",
    "qwen2",
    "qwen2-window",
    "qwen3",
    "llama-tied-biased",
    "phi3",
    "phi3-partial",
    "phi3-longrope",
    "phi3-longrope-short",
    "gemma2",
    "gemma3",
    "mixtral",
    "qwen3-moe",
    "qwen3-moe-sparse",
)
BLOCK = 4
TOLERANCE = 1e-4


@pytest.fixture(params=FAMILIES)
def pair(request, tiny_model):
    """A runner on the reference backend, and transformers' model."""
    folder, model = tiny_model(request.param)
    return runner_of(open_source(str(folder)), length=64 if request.param == "phi3-longrope-short" else None), model


def runner_of(source: ModelSource, length: int | None = None) -> Runner:
    config = EngineConfig(
        model=str(source.path), backend="reference", block_size=BLOCK, max_num_seqs=8, max_model_len=length
    )
    return Runner(source, config)


def tokens_of(length: int, seed: int) -> list[int]:
    return torch.randint(3, 320, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def truth(model, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float()


def request_with_blocks(tokens: list[int], first_block: int) -> Request:
    request = Request("r", tokens, SamplingParams(), seed=0)
    # Blocks in descending order: nothing may rely on their being neighbours.
    request.blocks = list(range(first_block, first_block + -(-len(tokens) // BLOCK)))[::-1]
    return request


def step(runner: Runner, chunks: list[Chunk]) -> torch.Tensor:
    batch = build_batch(chunks, BLOCK)
    return runner.logits(runner.hidden(batch))


def test_prefilled_in_chunks(pair) -> None:
    runner, model = pair
    tokens = tokens_of(41, seed=1)
    request = request_with_blocks(tokens, first_block=3)
    bounds = [0, 7, 8, 30, 41]
    found = torch.cat([step(runner, [Chunk(request, a, b - a)]) for a, b in pairwise(bounds)])
    torch.testing.assert_close(found, truth(model, tokens), atol=TOLERANCE, rtol=0)


def test_decoded_token_by_token(pair) -> None:
    runner, model = pair
    tokens = tokens_of(25, seed=2)
    request = request_with_blocks(tokens, first_block=0)
    found = torch.cat([step(runner, [Chunk(request, i, 1)]) for i in range(len(tokens))])
    torch.testing.assert_close(found, truth(model, tokens), atol=TOLERANCE, rtol=0)


def test_batched_with_others(pair) -> None:
    """Prompts of different lengths and decoding requests share steps."""
    runner, model = pair
    texts = [tokens_of(length, seed) for seed, length in enumerate((33, 1, 18, 40, 5))]
    requests, first = [], 0
    for text in texts:
        requests.append(request_with_blocks(text, first))
        first += len(requests[-1].blocks)
    found: list[list[torch.Tensor]] = [[] for _ in texts]
    done = [0] * len(texts)
    turn = 0
    while any(done[i] < len(text) for i, text in enumerate(texts)):
        # Each step takes another mixture of one token and of several.
        counts = [min(len(t) - done[i], 1 if (i + turn) % 2 else 6) for i, t in enumerate(texts)]
        chunks = [Chunk(r, done[i], counts[i]) for i, r in enumerate(requests) if counts[i]]
        rows = step(runner, chunks).split([chunk.count for chunk in chunks])
        for i, part in zip([i for i, c in enumerate(counts) if c], rows, strict=True):
            found[i].append(part)
            done[i] += counts[i]
        turn += 1
    for text, parts in zip(texts, found, strict=True):
        torch.testing.assert_close(torch.cat(parts), truth(model, text), atol=TOLERANCE, rtol=0)


def test_tolerance_would_notice_a_forgotten_bias(tiny_model) -> None:
    """The bound is tight enough to mean something: leaving one bias vector out breaks it by far."""
    folder, model = tiny_model("qwen2")
    source = open_source(str(folder))
    weights = source.layer(0)
    weights["self_attn.k_proj.bias"] = torch.zeros_like(weights["self_attn.k_proj.bias"])
    source.layer = lambda index: weights if index == 0 else type(source).layer(source, index)  # type: ignore[method-assign]
    runner = Runner(source, EngineConfig(model=str(folder), backend="reference", block_size=BLOCK, max_num_seqs=8))
    assert isinstance(runner.backend, ReferenceBackend)
    tokens = tokens_of(20, seed=3)
    found = step(runner, [Chunk(request_with_blocks(tokens, 0), 0, 20)])
    assert (found - truth(model, tokens)).abs().max() > 10 * TOLERANCE


FEATURES = {
    "windows of Phi-3": ("phi3", lambda c: replace(c, windows=(None,) * 3)),
    "a part of the head is rotated": ("phi3-partial", lambda c: replace(c, rope=replace(c.rope, partial=1.0))),
    "the long factors": (
        "phi3-longrope",
        lambda c: replace(c, rope=replace(c.rope, long_factors=c.rope.short_factors)),
    ),
    "the short factors": (
        "phi3-longrope-short",
        lambda c: replace(c, rope=replace(c.rope, original_max_position=1)),
    ),
    "longrope's attention factor": ("phi3-longrope", lambda c: replace(c, rope=replace(c.rope, attention_factor=1.0))),
    "the soft cap of attention": ("gemma2", lambda c: replace(c, attention_soft_cap=None)),
    "the soft cap of logits": ("gemma2", lambda c: replace(c, logit_soft_cap=None)),
    "the scale of attention": ("gemma2", lambda c: replace(c, attention_scale=None)),
    "the scale of embeddings": ("gemma2", lambda c: replace(c, embedding_scale=None)),
    "1 + w in norms": ("gemma2", lambda c: replace(c, norm_offset=0.0)),
    "GELU": ("gemma2", lambda c: replace(c, activation="silu")),
    "post norms": ("gemma2", lambda c: replace(c, post_norms=False)),
    "windows on every other layer": ("gemma2", lambda c: replace(c, windows=(None,) * 3)),
    "no window between": ("gemma2", lambda c: replace(c, windows=(16,) * 3)),
    "rotations of their own in layers with windows": ("gemma3", lambda c: replace(c, local_rope=None)),
    "linear scaling of the others": ("gemma3", lambda c: replace(c, rope=Rope(c.rope.theta))),
    "norms of queries and keys": ("gemma3", lambda c: replace(c, qk_norm=False)),
    "Mixtral's weights sum to 1": ("mixtral", lambda c: without_sum(c, normalised=False)),
    "Mixtral's second expert": ("mixtral", lambda c: without_sum(c, chosen=1)),
    "norm_topk_prob": ("qwen3-moe", lambda c: without_sum(c, normalised=False)),
    "no norm_topk_prob": ("qwen3-moe-sparse", lambda c: without_sum(c, normalised=True)),
}


def without_sum(config, **changes):
    return replace(config, experts=replace(config.experts, **changes))


@pytest.mark.parametrize("feature", FEATURES)
def test_tolerance_would_notice_the_absence_of(feature: str, tiny_model) -> None:
    family, without = FEATURES[feature]
    folder, model = tiny_model(family)
    source = open_source(str(folder))
    length = 64 if family == "phi3-longrope-short" else None
    tokens = tokens_of(40, seed=3)
    expected = truth(model, tokens)
    found = step(runner_of(source, length), [Chunk(request_with_blocks(tokens, 0), 0, 40)])
    assert (found - expected).abs().max() < TOLERANCE
    source.config = without(source.config)
    found = step(runner_of(source, length), [Chunk(request_with_blocks(tokens, 0), 0, 40)])
    assert (found - expected).abs().max() > 10 * TOLERANCE


def test_layers_without_experts_are_those_that_the_config_names(tiny_model) -> None:
    for family, expected in (("qwen3-moe", (True, False, True)), ("qwen3-moe-sparse", (False, True, False))):
        config = open_source(str(tiny_model(family)[0])).config
        assert config.experts is not None
        assert config.experts.layers == expected
