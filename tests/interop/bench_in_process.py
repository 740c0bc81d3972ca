"""llmopt's engine without a server, on the requests that a client sends to one: HTTP's cost is measured by it.

    python bench_in_process.py MODEL CASE

CASE is the JSON of a Case. Prints {"tokens_per_s": output tokens per second of all requests, prefill included}.
"""

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

from bench_artifacts import MODEL, run
from bench_clients import MEASURED_SEED, WARM_UP_SEED
from bench_engines import THREADS
from bench_rows import Case, Speed
from bench_servers import room

from llmopt import LLM, SamplingParams
from llmopt.bench.workload import Workload
from llmopt.engine.resident import keep_resident


class InProcess:
    """`LLM.generate` with all requests at once, of which as many run side by side as the client would send; in a
    process of its own for each turn, whose barriers sleep as those of a server's engine do."""

    settings = f"LLM.generate, {THREADS} threads"

    def __init__(self, model: Path) -> None:
        self.model = model

    def measure(self, case: Case) -> Speed:
        command = [sys.executable, __file__, str(self.model), json.dumps(asdict(case))]
        return Speed(**json.loads(run(command, env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"})))

    def close(self) -> None:
        pass


def tokens_per_s(model: str, case: Case) -> float:
    """Of the prompts that `llmopt bench` sends in this case, after as many others as run at once."""
    llm = LLM(
        model,
        max_num_seqs=case.batch,
        max_num_batched_tokens=case.batch * case.prompt_len,
        max_model_len=room(case),
        threads=THREADS,
    )
    keep_resident()  # as a server does
    params = SamplingParams(temperature=0, max_tokens=case.gen_len, ignore_eos=True)
    for requests, seed in ((case.batch, WARM_UP_SEED), (case.requests, MEASURED_SEED)):
        shape = {"input_len": case.prompt_len, "output_len": case.gen_len, "num_prompts": requests}
        _, prompts = Workload(tokenizer=MODEL, seed=seed, **shape).prompts()
        start = time.perf_counter()
        results = llm.generate([prompt.content for prompt in prompts], params)
        seconds = time.perf_counter() - start
    return sum(len(result.outputs[0].token_ids) for result in results) / seconds


if __name__ == "__main__":
    print(json.dumps({"tokens_per_s": tokens_per_s(sys.argv[1], Case(**json.loads(sys.argv[2])))}))
