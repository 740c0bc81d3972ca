"""The engines that are compared by themselves: how each is run so that it shows its best, and how its report is read.

All of them time the same two things. Prefill is `prompt_len` random tokens into an empty cache; decode is `batch`
streams, each with prompt_len tokens of context, that generate gen_len tokens more. Both are tokens per second of that
phase alone, with as many threads as there are cores.
"""

import json
import os
import select
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from bench_artifacts import LLMOPT, WORK, flags, run
from bench_rows import Case, Speed
from environments import HERE, PEERS, llama_tool, python

from llmopt.errors import LlmoptError

CORES = sorted(os.sched_getaffinity(0))
THREADS = len(CORES)
TIMEOUT = 900  # seconds that an engine may take to load, or to measure a case


class Engine(Protocol):
    """An engine with a model of its own.

    Attributes:
        settings: how it is run, in words for the report.
    """

    @property
    def settings(self) -> str: ...

    def measure(self, case: Case) -> Speed:
        """Raises LlmoptError where it fails."""

    def close(self) -> None:
        """Give back what it holds."""


class Ways:
    """Ways to run a program of which one is the fastest, here, and only a trial tells which.

    Attributes:
        fastest: by what was run.
    """

    def __init__(self, *ways: str) -> None:
        self.ways = ways
        self.fastest: dict[str, str] = {}

    def run(self, what: str, run: Callable[[str], Speed]) -> Speed:
        """The first time run all ways and keep the fastest; from then on run that."""
        if what in self.fastest:
            return run(self.fastest[what])
        speeds = {way: run(way) for way in self.ways}
        self.fastest[what] = max(speeds, key=lambda way: speeds[way].tokens_per_s)
        return speeds[self.fastest[what]]

    def __str__(self) -> str:
        return ", ".join(f"{way} in {what}" for what, way in self.fastest.items())


class LlamaCpp:
    """llama.cpp by its own two benchmarks: llama-bench for one stream, llama-batched-bench for several.

    Both leave sampling out. In the first turn of each case it runs with flash attention and without, and then keeps to
    what was the faster.
    """

    def __init__(self, model: Path) -> None:
        self.model = model
        self._flash = Ways("off", "on")

    @property
    def settings(self) -> str:
        return f"llama-bench, llama-batched-bench for batches, sampling not included; -t {THREADS}, -fa {self._flash}"

    def measure(self, case: Case) -> Speed:
        return self._flash.run(case.name, lambda flash: Speed(self._run(case, flash)))

    def _run(self, case: Case, flash: str) -> float:
        common = flags({"-m": self.model, "-t": THREADS, "-fa": flash})
        if case.batch == 1:
            prompt, depth = (case.prompt_len, 0) if case.is_prefill else (0, case.prompt_len)
            shape = {"-p": prompt, "-n": case.gen_len, "-d": depth, "-r": case.repeats}
            return read_llama_bench(run([str(llama_tool("bench")), *common, *flags(shape), "-o", "json"]))
        context = case.batch * (case.prompt_len + case.gen_len)
        shape = {"-npp": case.prompt_len, "-ntg": case.gen_len, "-npl": case.batch, "-c": context}
        command = [str(llama_tool("batched-bench")), *common, *flags(shape), "--output-format", "jsonl"]
        return read_batched_bench(run(command))

    def close(self) -> None:
        pass


def read_llama_bench(output: str) -> float:
    """The median of the repeats that `llama-bench -o json` lists, in tokens per second."""
    (test,) = json.loads(output)
    return median(test["samples_ts"])


def read_batched_bench(output: str) -> float:
    """S_TG of the one line of `llama-batched-bench --output-format jsonl`: batch · generated tokens / seconds."""
    (line,) = [line for line in output.splitlines() if line.startswith("{")]
    return json.loads(line)["speed_tg"]


class Llmopt:
    """llmopt by `llmopt bench`."""

    settings = "llmopt bench, sampling included"

    def __init__(self, model: Path) -> None:
        self.model = model

    def measure(self, case: Case) -> Speed:
        # The first token belongs to prefill. All prompts go into one step, so that all streams decode side by side.
        shape = {
            "--prompt-len": case.prompt_len,
            "--gen-len": case.gen_len + 1,
            "--batch": case.batch,
            "--repeats": case.repeats,
            "--max-num-batched-tokens": case.batch * case.prompt_len,
            "--threads": THREADS,
        }
        output = run([*LLMOPT, "bench", str(self.model), *flags(shape), "--json", "-"])
        return Speed(read_llmopt_bench(output, case))

    def close(self) -> None:
        pass


def read_llmopt_bench(output: str, case: Case) -> float:
    """The median of `llmopt bench --json`'s run of the case's phase."""
    phase = "prefill" if case.is_prefill else "decode"
    (speed,) = [run["tokens_per_s"]["median"] for run in json.loads(output)["runs"] if run["phase"] == phase]
    return speed


VLLM_ENVIRONMENT = {
    "LD_PRELOAD": str(PEERS / "vllm" / "venv" / "lib" / "libiomp5.so"),
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
}
VLLM_ONE_PROCESS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": str(THREADS),
    "KMP_BLOCKTIME": "5",
    "KMP_TPAUSE": "0",
}
"""Scheduling and computing in one process. Where it has a worker process, vLLM sets OpenMP's variables for that alone;
the last two are its own choice."""


class Vllm:
    """vLLM's offline engine, compiled, in a process of its own that loads the model once and waits between cases.

    It runs as its documentation advises for CPUs, a thread bound to each core and Intel's OpenMP loaded first, but for
    its worker process: with that it keeps a core for the process that schedules, which waits for the worker by spinning
    (vllm/utils/ompmultiprocessing.py, vllm/distributed/device_communicators/shm_broadcast.py). Without one nothing
    spins, all cores compute, and the binding is ours to ask of OpenMP.
    """

    settings = f"LLM, bfloat16, compiled, {THREADS} threads bound to cores, libiomp5 loaded first, sampling included"

    def __init__(self, model: Path) -> None:
        bound = f"granularity=fine,explicit,proclist=[{','.join(map(str, CORES))}]"
        environment = VLLM_ENVIRONMENT | VLLM_ONE_PROCESS | {"KMP_AFFINITY": bound}
        self.log = WORK / "vllm.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(python("vllm")), str(HERE / "peers" / "vllm_speed.py"), str(model)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | environment,
            )
        threads = self._answer()["threads"]  # it has loaded
        if threads != THREADS:
            self.close()
            raise LlmoptError(f"vLLM computes with {threads} threads although there are {THREADS} cores")

    def measure(self, case: Case) -> Speed:
        shape = {"batch": case.batch, "prompt_len": case.prompt_len, "gen_len": case.gen_len + 1}
        with suppress(BrokenPipeError):  # it has ended, which the wait for its answer reports
            self.process.stdin.write(json.dumps(shape | {"repeats": case.repeats}) + "\n")
            self.process.stdin.flush()
        return Speed(read_vllm_speed(self._answer(), case))

    def _answer(self) -> Any:
        ready, _, _ = select.select([self.process.stdout], [], [], TIMEOUT)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            self.process.kill()
            why = "ended" if ready else f"was silent for {TIMEOUT} s"
            raise LlmoptError(f"vllm_speed.py {why}; its last words: ...{self.log.read_text('utf-8')[-2000:]}")
        return json.loads(line)

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def read_vllm_speed(answer: list[tuple[float, float, int]], case: Case) -> float:
    """Tokens per second from an answer of vllm_speed.py: seconds of prefill, of decode, and tokens decoded."""
    if case.is_prefill:
        return median(case.batch * case.prompt_len / prefill_s for prefill_s, _, _ in answer)
    return median(tokens / decode_s for _, decode_s, tokens in answer)
