"""Measures llmopt against llama.cpp and vLLM on this machine, engines and servers: `make bench-peers`.

    python tests/interop/bench_peers.py [--rounds N] [--only PART]... [--artifact ENGINE=PATH]... [--qwen FILE]

PART is part of MODEL/CASE/ENGINE, such as decode-1/vllm, or http for all servers. Writes build/bench-peers.json:
{version, rounds, seconds, machine, busy_elsewhere, engines, rows, speeds, failed_requests, failures}, with speeds in
tokens per second, and prints the rows as a Markdown table. Exit status 3 says that a measurement failed; a row says how
many requests did.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_artifacts import WORK, describe
from bench_clients import CLIENTS, VLLM_CLIENT
from bench_engines import THREADS
from bench_programs import file_name, make_file, open_engine, prepare
from bench_rows import Case, Row, markdown, row_result
from bench_turns import Measurement, Turns, name_of
from environments import PEERS, VLLM, make

from llmopt.bench.machine import describe_machine
from llmopt.errors import InputError, LlmoptError

OUTPUT = PEERS.parent / "bench-peers.json"
VERSION = 1
SMALL, LARGE = "SmolLM2-135M", "Qwen2.5-Coder-1.5B"
PREFILL = Case(1, 512, 0)
HTTP = [Case(16, 128, 64, client) for client in CLIENTS]
ANY_WIDTH = ("llama.cpp-Q4_0", "llama.cpp-Q4_K_M", "llama.cpp-Q8_0", "vllm-bf16")
SERVERS = ("llama-server-Q4_0", "vllm-serve-bf16")
SMALL_ROWS = [
    Row(SMALL, case, ours, ANY_WIDTH, "any width")
    for case in (Case(1, 128, 128), Case(16, 128, 128), Case(32, 128, 128), PREFILL)
    for ours in ("llmopt-q4_0", "llmopt-gptq", "llmopt-gptq-head8")
] + [
    Row(SMALL, PREFILL, "llmopt-w8a8", ("llama.cpp-Q8_0",), "8 bits"),
    Row(SMALL, PREFILL, "llmopt-w8a8", ANY_WIDTH, "any width"),
]
HTTP_ROWS = [
    row
    for case in HTTP
    for kind in ("q4_0", "gptq", "gptq-head8")
    for row in (
        Row(SMALL, case, f"llmopt-serve-{kind}", SERVERS, "any width"),
        Row(
            SMALL,
            case,
            f"llmopt-serve-{kind}",
            (f"llmopt-in-process-{kind}",),
            f"the same in process, client {case.client}",
            title=f"http-{case.batch}/of-in-process",
        ),
    )
]
LARGE_ROWS = [
    Row(LARGE, case, "llmopt-Q4_K_M", ("llama.cpp-Q4_K_M",), "the same file")
    for case in (Case(1, 128, 128), Case(8, 128, 128), Case(1, 128, 0))
]


def main() -> int:
    options = _options()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # not without stopping the server
    rows = SMALL_ROWS + HTTP_ROWS + (LARGE_ROWS if options.qwen else [])
    wanted = chosen(rows, options.only)
    if not wanted:
        raise InputError(f"nothing is like {options.only}; there are {', '.join(map(name_of, chosen(rows, [])))}")
    start = time.perf_counter()
    WORK.mkdir(parents=True, exist_ok=True)
    artifacts = make_artifacts(wanted, options.artifact, options.qwen)
    torch.set_num_threads(THREADS)
    machine = describe_machine(torch.device("cpu"))
    with ExitStack() as stack:
        engines = {key: stack.enter_context(closing(open_engine(key[1], path))) for key, path in artifacts.items()}
        described = {key: describe(path) for key, path in artifacts.items()}
        turns = Turns(engines, wanted, options.rounds)
        for number in range(options.rounds):
            turns.take_round()
            report = {"version": VERSION, "rounds": number + 1, "seconds": time.perf_counter() - start}
            report |= results(rows, turns, machine, described)
            OUTPUT.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    print(markdown(report), end="")
    return LlmoptError.exit_status if turns.failures else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="turns that each engine takes in each case (default 3)")
    parser.add_argument("--only", action="append", default=[], help="part of MODEL/CASE/ENGINE; may be repeated")
    parser.add_argument(
        "--artifact",
        action="append",
        default=[],
        metavar="ENGINE=PATH",
        help=f"what to run of {SMALL} in place of what is made for it, such as llmopt-gptq=out/gptq, served or not",
    )
    parser.add_argument("--qwen", type=Path, metavar="FILE", help=f"also compare on this Q4_K_M GGUF of {LARGE}")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    options.artifact = {engine: Path(path) for engine, _, path in (entry.partition("=") for entry in options.artifact)}
    if not options.artifact.keys() <= {file_name(engine) for row in SMALL_ROWS for engine in (row.llmopt, *row.peers)}:
        parser.error("--artifact takes ENGINE=PATH; engines are those of the table, such as llmopt-gptq")
    return options


def chosen(rows: Sequence[Row], only: Sequence[str]) -> list[Measurement]:
    """What the rows need, each once, those of a case together, as far as their names hold a part of `only`."""
    needed = [(row.model, row.case, engine) for row in rows for engine in (row.llmopt, *row.peers)]
    return [each for each in dict.fromkeys(needed) if not only or any(part in name_of(each) for part in only)]


def make_artifacts(
    wanted: Sequence[Measurement], given: Mapping[str, Path], qwen: Path | None
) -> dict[tuple[str, str], Path]:
    """What each engine runs, by model and engine. Makes what is missing, and the peers' environments."""
    artifacts: dict[tuple[str, str], Path] = {}
    if any(case.client == VLLM_CLIENT for _, case, _ in wanted):
        make(VLLM)
    for model, engine in dict.fromkeys((model, engine) for model, _, engine in wanted):
        prepare(engine)
        if model == LARGE and qwen is not None:
            artifacts[model, engine] = qwen
        else:
            artifacts[model, engine] = given.get(file_name(engine)) or make_file(engine)
    return artifacts


def results(
    rows: Sequence[Row], turns: Turns, machine: Mapping[str, Any], described: Mapping[tuple[str, str], dict[str, Any]]
) -> dict[str, Any]:
    """What the rounds so far add up to; `described` says of each model and engine what it runs."""
    bandwidth = 1e9 * machine["memory_gb_per_s"]
    made = [
        row_result(row, turns.speeds, described[row.model, row.llmopt]["weight_bytes"], bandwidth)
        for row in rows
        if (row.model, row.llmopt) in described
    ]
    return {
        "machine": machine,
        "busy_elsewhere": {"median": median(turns.busy_elsewhere), "max": max(turns.busy_elsewhere)},
        "engines": [
            {"model": model, "engine": engine, **what, "settings": turns.engines[model, engine].settings}
            for (model, engine), what in described.items()
        ],
        "rows": [row for row in made if row is not None],
        "speeds": {name_of(each): [turn.tokens_per_s for turn in taken] for each, taken in turns.speeds.items()},
        "failed_requests": {
            name_of(each): [dict(turn.failed) for turn in taken]
            for each, taken in turns.speeds.items()
            if any(turn.failures for turn in taken)
        },
        "failures": {name_of(each): problem for each, problem in turns.failures.items()},
    }


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LlmoptError as error:
        print(f"bench_peers: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
