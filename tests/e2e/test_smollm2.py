"""The real model: its continuations equal transformers', and are the same alone, in a batch and after preemption."""

import pytest
import torch

from llmopt import LLM, SamplingParams
from llmopt.model.locate import locate

pytestmark = pytest.mark.model

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "Q: What is 17 + 25?\nA:",
    "The three laws of thermodynamics are",
    "Dear Sir or Madam,\n\nI am writing to",
    "Water boils at",
    "1, 1, 2, 3, 5, 8,",
    "In 1969, Neil Armstrong",
    "<|im_start|>user\nName a fruit.<|im_end|>\n<|im_start|>assistant\n",
]
TOKENS = 20
GREEDY = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(smollm2: str) -> LLM:
    return LLM(smollm2, backend="reference", max_num_seqs=16, max_model_len=512)


@pytest.fixture(scope="module")
def alone(llm: LLM) -> list[list[int]]:
    """Each prompt's continuation with nothing beside it."""
    return [llm.generate(prompt, GREEDY)[0].outputs[0].token_ids for prompt in PROMPTS]


def test_greedy_continuations_equal_those_of_transformers(smollm2: str, llm: LLM, alone: list[list[int]]) -> None:
    import transformers

    file = locate(smollm2)
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for prompt, found in zip(PROMPTS, alone, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        assert inputs.input_ids[0].tolist() == llm.engine.tokenizer.encode(prompt)
        with torch.no_grad():
            expected = model.generate(
                **inputs, do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS, eos_token_id=None
            )
        assert found == expected[0, inputs.input_ids.shape[1] :].tolist(), prompt


def test_the_same_in_a_batch_of_16(llm: LLM, alone: list[list[int]]) -> None:
    prompts = [*PROMPTS, *PROMPTS[:6]]
    together = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)]
    assert together == [*alone, *alone[:6]]


def test_the_same_after_preemption(smollm2: str, alone: list[list[int]]) -> None:
    """A cache with room for two or three of the ten, so that they push each other out."""
    blocks, block_size = 7, 8
    token_bytes = 30 * 2 * 3 * 64 * 4
    small = LLM(
        smollm2,
        backend="reference",
        max_num_seqs=16,
        max_model_len=48,
        block_size=block_size,
        kv_cache_memory_bytes=blocks * block_size * token_bytes,
    )
    found = [output.outputs[0].token_ids for output in small.generate(PROMPTS, GREEDY)]
    assert small.engine.stats().preemptions > 0
    assert small.engine.stats().used_blocks == 0
    small.engine.check()
    assert found == alone


def test_a_seed_gives_the_same_text_whatever_else_runs(llm: LLM) -> None:
    sampled = SamplingParams(temperature=0.8, top_p=0.9, seed=7, max_tokens=TOKENS, n=2)
    first = llm.generate(PROMPTS[1], sampled)[0].outputs
    others = [SamplingParams(max_tokens=TOKENS)] * 5
    again = llm.generate([*PROMPTS[2:7], PROMPTS[1]], [*others, sampled])[-1].outputs
    assert [o.token_ids for o in again] == [o.token_ids for o in first]
    assert first[0].token_ids != first[1].token_ids


def test_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    whole = llm.generate(PROMPTS[0], GREEDY)[0].outputs[0].text
    stop = whole[10:14]
    output = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=TOKENS, stop=(stop,)))[0].outputs[0]
    assert output.finish_reason == "stop" and output.stop_reason == stop
    assert output.text == whole[: whole.index(stop)]


def test_chat_ends_by_itself(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=60)
    output = llm.chat([{"role": "user", "content": "What is the capital of France?"}], params).outputs[0]
    assert output.finish_reason == "stop"
    assert "Paris" in output.text
    assert "<|im_end|>" not in output.text
