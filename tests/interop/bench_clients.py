"""The clients that send the same requests to every server: vLLM's own `vllm bench serve`, and `llmopt bench`.

Both send random prompts, a given number of requests at once and the next when one is answered, and ask for exactly
case.gen_len greedy tokens. Both count the output tokens of all answers over the time from the first request to the
last answer, prefill and all. `llmopt bench` sends token ids, `vllm bench serve` sends text.
"""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from bench_artifacts import LLMOPT, MODEL, bfloat16_folder, flags, run
from bench_engines import TIMEOUT
from bench_rows import Case, Speed
from environments import program

from llmopt.errors import LlmoptError

VLLM_CLIENT = "vllm-bench-serve"
SERVED = "bench"  # the model's name on every server
MEASURED_SEED, WARM_UP_SEED = 1, 2  # of prompts; those of the warm-up are others, or a cache would be measured

Client = Callable[[str, Case], Speed]
"""Sends a server, by its address, the requests of a case. Raises LlmoptError where none is answered."""


def warm_up(url: str, case: Case) -> None:
    """Fill every slot of the server once."""
    _llmopt_bench(url, case, case.batch, WARM_UP_SEED)


def by_llmopt(url: str, case: Case) -> Speed:
    """What `llmopt bench --base-url` measures."""
    return read_llmopt_load(_llmopt_bench(url, case, case.requests, MEASURED_SEED))


def _llmopt_bench(url: str, case: Case, requests: int, seed: int) -> str:
    options = {
        "--base-url": url,
        "--model": SERVED,
        "--tokenizer": MODEL,
        "--input-len": case.prompt_len,
        "--output-len": case.gen_len,
        "--num-prompts": requests,
        "--max-concurrency": case.batch,
        "--seed": seed,
        "--json": "-",
    }
    return run([*LLMOPT, "bench", *flags(options)], timeout=TIMEOUT)


def read_llmopt_load(output: str) -> Speed:
    """The speed in a report of `llmopt bench --base-url --json`."""
    report = json.loads(output)
    return Speed(report["output_tokens_per_s"], report["requests"]["total"], report["errors"])


def by_vllm(url: str, case: Case) -> Speed:
    """What `vllm bench serve` measures."""
    environment = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "--base-url": url,
            "--model": SERVED,
            "--tokenizer": bfloat16_folder(),
            "--dataset-name": "random",
            "--random-input-len": case.prompt_len,
            "--random-output-len": case.gen_len,
            "--num-prompts": case.requests,
            "--max-concurrency": case.batch,
            "--temperature": 0,
            "--seed": MEASURED_SEED,
            "--result-dir": folder,
            "--result-filename": "result.json",
        }
        switches = ("--ignore-eos", "--disable-tqdm", "--save-result", "--save-detailed")  # detailed: with the errors
        command = [str(program("vllm", "vllm")), "bench", "serve", *flags(options), *switches]
        run(command, env=os.environ | environment, timeout=TIMEOUT)
        return read_vllm_load((Path(folder) / "result.json").read_text("utf-8"))


def read_vllm_load(output: str) -> Speed:
    """The speed in a detailed result of `vllm bench serve`."""
    report = json.loads(output)
    failed = Counter(error.strip().splitlines()[-1] for error in report["errors"] if error.strip())  # tracebacks
    failed["no reason given"] += report["failed"] - failed.total()
    if not report["completed"]:
        raise LlmoptError(f"all {report['failed']} requests failed, most with: {failed.most_common(1)[0][0]}")
    return Speed(report["output_throughput"], report["completed"] + report["failed"], +failed)


CLIENTS: dict[str, Client] = {VLLM_CLIENT: by_vllm, "llmopt-bench": by_llmopt}
"""By their names in a case."""
