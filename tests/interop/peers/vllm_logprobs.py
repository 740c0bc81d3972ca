"""Runs in vLLM's environment: loads an artifact, continues each prompt, and writes what it thinks of the prompts.

    python vllm_logprobs.py ARTIFACT TOKENS.json LOGPROBS.npz

TOKENS.json holds sequences of token ids, all of one length. vLLM gives the likeliest TOP tokens of each position rather
than all logits, so LOGPROBS.npz holds `ids` int32 and `logprobs` float32, [sequences, length - 1, TOP] each, for
positions 0 to length - 2, and `generated` int32 [sequences, NEW], the greedy continuations.
"""

import json
import os
import sys
from pathlib import Path

# One process: a failure then ends this script with its own message.
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR")

import numpy as np
from vllm import LLM, SamplingParams

TOP = 256
NEW = 16


def main() -> None:
    artifact, tokens, output = sys.argv[1:]
    prompts = json.loads(Path(tokens).read_text("utf-8"))
    llm = LLM(
        artifact,
        dtype="bfloat16",
        max_model_len=len(prompts[0]) + NEW,
        max_num_seqs=len(prompts),
        enforce_eager=True,
        enable_prefix_caching=False,
        max_logprobs=TOP,
    )
    params = SamplingParams(temperature=0, max_tokens=NEW, min_tokens=NEW, prompt_logprobs=TOP)
    results = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    ids, logprobs = [], []
    for result in results:
        # The first entry is None, since nothing predicts the first token; a token of the text that is not among the
        # likeliest comes as one more entry.
        rows = [sorted(row.items(), key=lambda item: item[1].rank)[:TOP] for row in result.prompt_logprobs[1:]]
        ids.append([[token for token, _ in row] for row in rows])
        logprobs.append([[entry.logprob for _, entry in row] for row in rows])
    np.savez(
        output,
        ids=np.asarray(ids, np.int32),
        logprobs=np.asarray(logprobs, np.float32),
        generated=np.asarray([result.outputs[0].token_ids for result in results], np.int32),
    )


if __name__ == "__main__":
    main()
