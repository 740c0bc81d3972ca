"""All layers in one call, against transformers' logits and against itself in other steps."""

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

FAMILIES = ("llama", "llama3-rope", "mistral-window", "qwen2", "qwen2-window", "qwen3", "llama-tied-biased")
BLOCK = 16
TOLERANCE = 0.02  # of the logits' spread: weights are held in 16 bits, attention rounds to bfloat16


def fused_runner(folder, **settings) -> Runner:
    runner = Runner(
        open_source(str(folder)), EngineConfig(model=str(folder), backend="cpu", max_num_seqs=8, **settings)
    )
    assert runner.fused is not None
    return runner


def tokens_of(length: int, seed: int) -> list[int]:
    return torch.randint(3, 320, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def request_of(tokens: list[int], first_block: int) -> Request:
    request = Request("r", tokens, SamplingParams(), seed=0)
    request.blocks = list(range(first_block, first_block + -(-len(tokens) // BLOCK)))[::-1]
    return request


def logits_of(runner: Runner, chunks: list[Chunk]) -> torch.Tensor:
    return runner.logits(runner.hidden(build_batch(chunks, BLOCK)))


def in_chunks(runner: Runner, tokens: list[int], size: int) -> torch.Tensor:
    request = request_of(tokens, first_block=1)
    starts = range(0, len(tokens), size)
    return torch.cat([logits_of(runner, [Chunk(request, a, min(size, len(tokens) - a))]) for a in starts])


@pytest.mark.parametrize("family", FAMILIES)
def test_close_to_transformers(family, tiny_model) -> None:
    folder, model = tiny_model(family)
    tokens = tokens_of(41, seed=1)
    with torch.no_grad():
        truth = model(torch.tensor([tokens])).logits[0].float()
    found = in_chunks(fused_runner(folder), tokens, size=41)
    assert (found - truth).abs().max() < TOLERANCE * truth.std() * 5
    assert (found - truth).std() < TOLERANCE * truth.std()


@pytest.mark.parametrize("family", ["llama", "qwen2-window", "qwen3"])
def test_the_same_to_the_bit_however_tokens_are_cut_into_steps(family, tiny_model) -> None:
    runner = fused_runner(tiny_model(family)[0])
    tokens = tokens_of(50, seed=2)
    whole = in_chunks(runner, tokens, size=50)
    for size in (1, 7, 16, 33):
        assert torch.equal(in_chunks(runner, tokens, size), whole), f"in chunks of {size}"


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_same_to_the_bit_beside_others(family, tiny_model) -> None:
    runner = fused_runner(tiny_model(family)[0])
    texts = [tokens_of(length, seed) for seed, length in enumerate((33, 1, 18, 40, 5))]
    alone = [in_chunks(runner, text, len(text)) for text in texts]
    chunks, first = [], 0
    for text in texts:
        request = request_of(text, first)
        first += len(request.blocks)
        chunks.append(Chunk(request, 0, len(text)))
    together = logits_of(runner, chunks).split([len(text) for text in texts])
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_a_step_gives_the_logits_of_the_tokens_that_close_a_gap(tiny_model) -> None:
    runner = fused_runner(tiny_model("llama")[0])
    texts = [tokens_of(20, seed=3), tokens_of(9, seed=4), tokens_of(6, seed=5)]
    requests = [request_of(text, 2 * number) for number, text in enumerate(texts)]
    counts = (20, 5, 6)  # of the second request more is to come
    batch = build_batch([Chunk(request, 0, count) for request, count in zip(requests, counts, strict=True)], BLOCK)
    all_logits = runner.logits(runner.hidden(batch))
    assert torch.equal(runner.run(batch), all_logits[[19, 30]])


@pytest.mark.parametrize("settings", [{}, {"kv_cache_dtype": "float32"}], ids=["fused", "one by one"])
def test_a_step_that_closes_no_gap_gives_no_logits(settings, tiny_model) -> None:
    folder, _ = tiny_model("llama")
    config = EngineConfig(model=str(folder), backend="cpu", max_num_seqs=8, **settings)
    runner = Runner(open_source(str(folder)), config)
    batch = build_batch([Chunk(request_of(tokens_of(20, seed=3), 0), 0, 10)], BLOCK)
    assert runner.run(batch).shape == (0, 320)


@pytest.mark.parametrize(
    ("settings", "word"), [({"block_size": 8}, "blocks"), ({"kv_cache_dtype": "float32"}, "float32")]
)
def test_what_it_cannot_do_is_done_step_by_step_with_a_warning(settings, word, tiny_model, caplog) -> None:
    folder, _ = tiny_model("llama")
    config = EngineConfig(model=str(folder), backend="cpu", max_num_seqs=8, **settings)
    assert Runner(open_source(str(folder)), config).fused is None
    assert [word in record.getMessage() for record in caplog.records if "plain torch" in record.getMessage()] == [True]
