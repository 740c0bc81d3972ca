"""Log-probabilities of prompts: the model's own, however the prompt is cut into steps and whatever runs beside it."""

from typing import Any

import pytest
import torch

from llmopt.engine import prompt_logprobs
from llmopt.engine.llm import LLM
from llmopt.engine.outputs import RequestOutput
from llmopt.engine.params import SamplingParams
from llmopt.engine.prompt_logprobs import due_tokens
from llmopt.engine.request import Request
from llmopt.engine.scheduler import Chunk

PROMPT = [(7 * i * i + 3 * i) % 300 + 5 for i in range(60)]
BACKENDS = [("reference", "float32"), ("cpu", "float32"), ("cpu", "auto")]


def make_llm(tiny_model, backend: str = "reference", dtype: str = "float32", **options: Any) -> LLM:
    if backend == "cpu":
        pytest.importorskip("llmopt.kernels._cpu")
    return LLM(str(tiny_model("llama")[0]), backend=backend, dtype=dtype, block_size=16, **options)


def scored(llm: LLM, *prompts: list[int], **params: Any) -> list[RequestOutput]:
    wanted = SamplingParams(**{"temperature": 0, "max_tokens": 2, "prompt_logprobs": 3, "ignore_eos": True, **params})
    return llm.generate(list(prompts), wanted)


@pytest.mark.parametrize("budget", [2048, 7])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS[:2])
def test_the_same_as_a_whole_sequence_in_transformers(tiny_model, backend: str, dtype: str, budget: int) -> None:
    llm = make_llm(tiny_model, backend, dtype, max_num_batched_tokens=budget, max_num_seqs=4)
    prompts = [PROMPT, PROMPT[:1], PROMPT[5:25]]
    for prompt, output in zip(prompts, scored(llm, *prompts), strict=True):
        with torch.no_grad():
            expected = tiny_model("llama")[1](torch.tensor([prompt])).logits[0].log_softmax(-1)
        found = output.prompt_logprobs
        assert found is not None and len(found) == len(prompt) and found[0] is None
        for position, step in enumerate(found[1:], 1):
            row = expected[position - 1]
            assert step is not None and step.token_id == prompt[position]
            assert step.logprob == pytest.approx(row[prompt[position]].item(), abs=1e-4)
            assert step.rank == (row >= row[prompt[position]]).sum()
            assert [token for token, _ in step.top] == row.topk(3).indices.tolist()
            assert [value for _, value in step.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_a_token_has_one_float_wherever_it_stands(tiny_model, backend: str, dtype: str) -> None:
    found = scored(make_llm(tiny_model, backend, dtype), PROMPT, prompt_logprobs=20)[0].prompt_logprobs
    assert found is not None
    among_top = [(step.logprob, dict(step.top)[step.token_id]) for step in found[1:] if step and step.rank <= 20]
    assert among_top
    assert all(own == top for own, top in among_top)


def test_neither_cuts_nor_neighbours_change_a_bit(tiny_model) -> None:
    alone = scored(make_llm(tiny_model, "cpu", "auto"), PROMPT)[0]
    small = make_llm(tiny_model, "cpu", "auto", max_num_batched_tokens=9, max_num_seqs=4)
    among = scored(small, PROMPT[20:], PROMPT, PROMPT[:11])[1]
    assert among.prompt_logprobs == alone.prompt_logprobs
    assert among.outputs[0].token_ids == alone.outputs[0].token_ids


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_a_seeded_request_gets_the_same_whatever_else_is_in_the_batch(tiny_model, backend: str, dtype: str) -> None:
    llm = make_llm(tiny_model, backend, dtype, max_num_seqs=8)
    own = SamplingParams(seed=11, temperature=1.5, top_p=0.95, max_tokens=12, ignore_eos=True, logit_bias={9: 3.0})
    others = [
        SamplingParams(max_tokens=9, prompt_logprobs=2, logprobs=1),
        SamplingParams(max_tokens=5, temperature=0, allowed_token_ids=[7, 8, 9], min_tokens=3),
        SamplingParams(max_tokens=20, bad_words=["the"], presence_penalty=1.0, repetition_penalty=1.3),
    ]
    alone = llm.generate([PROMPT[:10]], own)[0].outputs[0].token_ids
    for place in range(4):
        prompts, params = [PROMPT[i:] for i in range(3)], list(others)
        prompts.insert(place, PROMPT[:10])
        params.insert(place, own)
        assert llm.generate(prompts, params)[place].outputs[0].token_ids == alone


def test_a_prompt_that_was_preempted_is_reported_once(tiny_model) -> None:
    expected = [output.prompt_logprobs for output in scored(make_llm(tiny_model), PROMPT, PROMPT[10:])]
    # Ten blocks of 16 tokens hold one whole request: the second is preempted, and its prompt computed again.
    llm = make_llm(tiny_model, kv_cache_memory_bytes=10 * 16 * 768, max_model_len=150, max_num_seqs=2)
    outputs = scored(llm, PROMPT, PROMPT[10:], max_tokens=80)
    assert llm.engine.stats().preemptions > 0
    for output, logprobs in zip(outputs, expected, strict=True):
        assert [step and step.token_id for step in output.prompt_logprobs] == [
            step and step.token_id for step in logprobs
        ]


def test_logits_of_a_long_prompt_are_never_all_there(tiny_model, monkeypatch) -> None:
    llm = make_llm(tiny_model)
    expected = scored(llm, PROMPT)[0].prompt_logprobs
    computed: list[int] = []
    logits = llm.engine.runner.logits
    monkeypatch.setattr(llm.engine.runner, "logits", lambda hidden: computed.append(len(hidden)) or logits(hidden))
    monkeypatch.setattr(prompt_logprobs, "LOGITS_AT_ONCE", 10 * 320 + 5)
    found = scored(llm, PROMPT, max_tokens=1)[0].prompt_logprobs
    assert computed == [10, 10, 10, 10, 10, 9, 1]
    assert [step and step.token_id for step in found] == [step and step.token_id for step in expected]


def test_the_first_of_several_choices_tells_of_the_prompt(tiny_model) -> None:
    llm = make_llm(tiny_model)
    (output,) = scored(llm, PROMPT, n=3, temperature=1.0)
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(PROMPT)
    (output,) = scored(llm, PROMPT, prompt_logprobs=None)
    assert output.prompt_logprobs is None
    (output,) = scored(llm, PROMPT, prompt_logprobs=0)
    assert output.prompt_logprobs is not None and all(step.top == [] for step in output.prompt_logprobs[1:] if step)


def test_the_cache_is_not_read_until_all_is_reported() -> None:
    request = Request("r", [1, 2, 3], SamplingParams(prompt_logprobs=0), 0)
    assert request.skip_reading_prefix_cache
    assert [(due.row, due.token) for due in due_tokens([Chunk(request, 0, 3)])] == [(0, 2), (1, 3)]
    request.prompt_logprobs += [None, None]
    assert not request.skip_reading_prefix_cache
    assert due_tokens([Chunk(request, 0, 3)]) == []
    assert not Request("r", [1, 2, 3], SamplingParams(logprobs=0), 0).skip_reading_prefix_cache
