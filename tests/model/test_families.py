"""Every family's logits equal transformers' on the same random weights, however the tokens are cut into steps."""

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
from llmopt.model.source import open_source

FAMILIES = ("llama", "llama3-rope", "mistral-window", "qwen2", "qwen2-window", "qwen3", "llama-tied-biased")
BLOCK = 4
TOLERANCE = 1e-4


@pytest.fixture(params=FAMILIES)
def pair(request, tiny_model):
    """A runner on the reference backend, and transformers' model."""
    folder, model = tiny_model(request.param)
    config = EngineConfig(model=str(folder), backend="reference", block_size=BLOCK, max_num_seqs=8)
    return Runner(open_source(str(folder)), config), model


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
