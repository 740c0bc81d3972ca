"""The engines that are compared: how each is run so that it shows its best, and how its own report is read.

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

from bench_artifacts import LLMOPT, WORK, run
from bench_rows import Case
from environments import HERE, PEERS, llama_tool, python

from llmopt.errors import LlmoptError

THREADS = len(os.sched_getaffinity(0))
TIMEOUT = 900  # seconds that an engine may take to load, or to measure a case


class Engine(Protocol):
    """An engine with a model of its own.

    Attributes:
        settings: how it is run, in words for the report.
    """

    @property
    def settings(self) -> str: ...

    def tokens_per_s(self, case: Case) -> float:
        """Raises LlmoptError where it fails."""

    def close(self) -> None:
        """Give back what it holds."""


def _options(values: dict[str, int]) -> list[str]:
    return [str(part) for option in values.items() for part in option]


class LlamaCpp:
    """llama.cpp by its own two benchmarks: llama-bench for one stream, llama-batched-bench for several.

    Both leave sampling out. In the first turn of each case it runs with flash attention and without, and then keeps to
    what was the faster.
    """

    def __init__(self, model: Path) -> None:
        self.model = model
        self._flash: dict[Case, str] = {}

    @property
    def settings(self) -> str:
        flash = ", ".join(f"{choice} in {case.name}" for case, choice in self._flash.items())
        return f"llama-bench, llama-batched-bench for batches, sampling not included; -t {THREADS}, -fa {flash}"

    def tokens_per_s(self, case: Case) -> float:
        if case in self._flash:
            return self._run(case, self._flash[case])
        speeds = {choice: self._run(case, choice) for choice in ("off", "on")}
        self._flash[case] = max(speeds, key=speeds.__getitem__)
        return speeds[self._flash[case]]

    def _run(self, case: Case, flash: str) -> float:
        common = ["-m", str(self.model), "-t", str(THREADS), "-fa", flash]
        if case.batch == 1:
            prompt, depth = (case.prompt_len, 0) if case.is_prefill else (0, case.prompt_len)
            shape = {"-p": prompt, "-n": case.gen_len, "-d": depth, "-r": case.repeats}
            return read_llama_bench(run([str(llama_tool("bench")), *common, *_options(shape), "-o", "json"]))
        context = case.batch * (case.prompt_len + case.gen_len)
        shape = {"-npp": case.prompt_len, "-ntg": case.gen_len, "-npl": case.batch, "-c": context}
        command = [str(llama_tool("batched-bench")), *common, *_options(shape), "--output-format", "jsonl"]
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

    def tokens_per_s(self, case: Case) -> float:
        # The first token belongs to prefill. All prompts go into one step, so that all streams decode side by side.
        shape = {
            "--prompt-len": case.prompt_len,
            "--gen-len": case.gen_len + 1,
            "--batch": case.batch,
            "--repeats": case.repeats,
            "--max-num-batched-tokens": case.batch * case.prompt_len,
            "--threads": THREADS,
        }
        output = run([*LLMOPT, "bench", str(self.model), *_options(shape), "--json", "-"])
        return read_llmopt_bench(output, case)

    def close(self) -> None:
        pass


def read_llmopt_bench(output: str, case: Case) -> float:
    """The median of `llmopt bench --json`'s run of the case's phase."""
    phase = "prefill" if case.is_prefill else "decode"
    (speed,) = [run["tokens_per_s"]["median"] for run in json.loads(output)["runs"] if run["phase"] == phase]
    return speed


class Vllm:
    """vLLM's offline engine, compiled, in a process of its own that loads the model once and waits between cases.

    It runs as its documentation advises for CPUs: a thread bound to each core, Intel's OpenMP loaded first.
    """

    settings = f"LLM, bfloat16, compiled, {THREADS} threads bound to cores, libiomp5 loaded first, sampling included"

    def __init__(self, model: Path) -> None:
        environment = {
            "LD_PRELOAD": str(PEERS / "vllm" / "venv" / "lib" / "libiomp5.so"),
            "OMP_NUM_THREADS": str(THREADS),
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
        }
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
        self._answer()  # that it has loaded

    def tokens_per_s(self, case: Case) -> float:
        shape = {"batch": case.batch, "prompt_len": case.prompt_len, "gen_len": case.gen_len + 1}
        with suppress(BrokenPipeError):  # it has ended, which the wait for its answer reports
            self.process.stdin.write(json.dumps(shape | {"repeats": case.repeats}) + "\n")
            self.process.stdin.flush()
        return read_vllm_speed(self._answer(), case)

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


def open_engine(name: str, model: Path) -> Engine:
    """The engine of a name such as llama.cpp-Q4_0, loaded if it stays loaded. Raises LlmoptError where it fails."""
    engines: dict[str, Callable[[Path], Engine]] = {"llmopt": Llmopt, "llama.cpp": LlamaCpp, "vllm": Vllm}
    return engines[name.partition("-")[0]](model)
