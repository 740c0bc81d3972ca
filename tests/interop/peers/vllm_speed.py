"""Runs in vLLM's environment: loads a model once, then times whatever is asked for, one JSON object a line each way.

    python vllm_speed.py MODEL

Reads {batch, prompt_len, gen_len, repeats} and answers [[prefill_s, decode_s, decode_tokens], ...], one a repeat, by
the definition of llmopt's own benchmark: prefill ends when the last request of the batch has its first token, decode
when all have gen_len. The first line that it writes, {threads}, says that the model is loaded, and with how many
threads it is computed.
"""

import json
import os
import random
import sys
import time

import torch
from vllm import LLM, LLMEngine, SamplingParams

WARM_UP_TOKENS = 4


def main() -> None:
    # Standard output is for the answers; what vLLM says there goes to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    (model,) = sys.argv[1:]
    llm = LLM(
        model,
        dtype="bfloat16",
        max_num_seqs=32,
        max_model_len=1024,
        max_num_batched_tokens=4096,  # 32 prompts of 128 tokens at once
        enable_prefix_caching=False,
    )
    print(json.dumps({"threads": torch.get_num_threads()}), file=answers, flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        shape = case["batch"], case["prompt_len"]
        run_batch(llm, *shape, min(case["gen_len"], WARM_UP_TOKENS))
        rounds = [run_batch(llm, *shape, case["gen_len"]) for _ in range(case["repeats"])]
        print(json.dumps(rounds), file=answers, flush=True)


def run_batch(llm: LLM, batch: int, prompt_len: int, gen_len: int) -> tuple[float, float, int]:
    """Seconds of prefill, seconds of decode, and tokens given out in the latter, of random prompts."""
    vocabulary = llm.get_tokenizer().vocab_size
    prompts = [[random.randrange(vocabulary) for _ in range(prompt_len)] for _ in range(batch)]
    params = SamplingParams(temperature=0, max_tokens=gen_len, ignore_eos=True, detokenize=False)
    engine = llm.llm_engine
    start = time.perf_counter()
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
    produced: dict[str, int] = {}
    while len(produced) < batch:
        produced |= _step(engine)
    early, end_of_prefill = sum(produced.values()), time.perf_counter()
    while engine.has_unfinished_requests():
        engine.step()
    return end_of_prefill - start, time.perf_counter() - end_of_prefill, batch * gen_len - early


def _step(engine: LLMEngine) -> dict[str, int]:
    """Computes a step; how many tokens those requests have by now that it gave one to."""
    return {output.request_id: len(output.outputs[0].token_ids) for output in engine.step()}


if __name__ == "__main__":
    main()
