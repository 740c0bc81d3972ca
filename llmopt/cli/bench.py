"""`llmopt bench`: read the options, measure a model here or a server elsewhere, show the numbers."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from llmopt.cli import console
from llmopt.engine.config import BackendName, DeviceName, DTypeName, KVCacheDTypeName
from llmopt.errors import InputError

if TYPE_CHECKING:
    from llmopt.bench.metrics import RequestTrace

_HERE = "Of a model in this process"
_THERE = "Of a server"
_GRID = ("prompt_len", "gen_len", "batch", "repeats")
_ENGINE = ("backend", "device", "threads", "dtype", "kv_cache_dtype", "kv_cache_memory_bytes", "max_num_batched_tokens")
_OF_A_SERVER = ("model_name", "api_key", "dataset_name", "dataset_path", "tokenizer", "input_len", "output_len",
                "num_prompts", "request_rate", "burstiness", "max_concurrency", "num_warmups", "ignore_eos", "goodput",
                "num_gpus", "timeout")  # fmt: skip


def _here(*names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=_HERE, **more)


def _there(*names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=_THERE, **more)


def bench(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A folder, a .gguf file, a hub id, or smollm2; measured in this process."),
    ] = None,
    prompt_len: Annotated[
        list[str] | None,
        _here("--prompt-len", "-p", metavar="N,N", help="Prompt tokens, such as 128,512; may be repeated.  [512]"),
    ] = None,
    gen_len: Annotated[
        list[str] | None, _here("--gen-len", "-n", metavar="N,N", help="Tokens to generate, in the same form.  [128]")
    ] = None,
    batch: Annotated[
        list[str] | None, _here("--batch", "-b", metavar="N,N", help="Requests at once, in the same form.  [1]")
    ] = None,
    repeats: Annotated[int, _here(help="Measured rounds of each case, after one warm-up.")] = 3,
    backend: Annotated[BackendName, _here(help="What computes.")] = "auto",
    device: Annotated[DeviceName, _here(help="Where it computes.")] = "auto",
    threads: Annotated[int | None, _here(help="CPU threads; by default one a core.")] = None,
    dtype: Annotated[DTypeName, _here(help="Of activations.")] = "auto",
    kv_cache_dtype: Annotated[KVCacheDTypeName, _here(help="Of the KV cache; auto is as the activations.")] = "auto",
    kv_cache_memory_bytes: Annotated[int | None, _here(help="Size of the KV cache.")] = None,
    max_num_batched_tokens: Annotated[int, _here(help="Tokens computed in one step, at most.")] = 2048,
    speculative_config: Annotated[
        str | None, _here(metavar="JSON", help="Draft tokens and verify them, as in serve. The prompts stay random.")
    ] = None,
    base_url: Annotated[
        str | None, _there(help="Measure this OpenAI-compatible server instead, such as http://127.0.0.1:8000.")
    ] = None,
    model_name: Annotated[str | None, _there("--model", help="The model's name on the server.")] = None,
    api_key: Annotated[
        str | None,
        _there(
            envvar="LLMOPT_API_KEY",
            show_default=False,
            help="The server's key. Prefer the variable: other users can see options.",
        ),
    ] = None,
    dataset_name: Annotated[
        Literal["random", "custom"], _there(help="Random prompts, or those of --dataset-path.")
    ] = "random",
    dataset_path: Annotated[
        Path | None,
        _there(help='JSONL with {"prompt": TEXT} a line, and "max_tokens" if it differs from --output-len.'),
    ] = None,
    tokenizer: Annotated[
        str | None,
        _there(
            help="MODEL whose tokens random prompts are drawn from, to send exactly --input-len of them; without it "
            "--input-len counts random English words."
        ),
    ] = None,
    input_len: Annotated[int | None, _there(help="Length of a random prompt.  [512]")] = None,
    output_len: Annotated[int, _there(help="Tokens to generate.")] = 128,
    num_prompts: Annotated[int, _there(help="Requests in all.")] = 100,
    request_rate: Annotated[float, _there(help="Requests per second; inf sends all at once.")] = math.inf,
    burstiness: Annotated[
        float | None, _there(help="Of a finite rate: 1 is a Poisson process, less is burstier, more is steadier.  [1]")
    ] = None,
    max_concurrency: Annotated[int | None, _there(help="Requests in flight, at most.")] = None,
    num_warmups: Annotated[int, _there(help="Requests that are sent first and not measured.")] = 1,
    ignore_eos: Annotated[
        bool, _there(help="Ask for --output-len tokens whatever the model says. Not every server knows this extension.")
    ] = True,
    goodput: Annotated[
        list[str] | None,
        _there(help="Count requests that keep limits in ms, such as ttft:500,tpot:50 (or e2el); may be repeated."),
    ] = None,
    num_gpus: Annotated[int, _there(help="GPUs of the server, for throughput per GPU.")] = 0,
    timeout: Annotated[float, _there(help="Seconds that a request may take.")] = 600.0,
    seed: Annotated[int, typer.Option(help="Seeds the prompts and the arrivals.")] = 0,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON; - for standard output.")
    ] = None,
) -> None:
    """Measure speed: of MODEL in this process, or of a server with --base-url.

    Example: llmopt bench smollm2 -p 128,512 -n 64 -b 1,8

    Example: llmopt bench --base-url http://127.0.0.1:8000 --model smollm2 --tokenizer smollm2 --max-concurrency 8
    """
    options = dict(context.params)
    if (model is None) == (base_url is None):
        raise InputError("give either MODEL, to measure it in this process, or --base-url URL, to measure a server")
    if base_url is None:
        console.refuse(context, _OF_A_SERVER, "--base-url")
        result = _bench_here(options)
        _show_runs(result, json_file)
    else:
        console.refuse(context, (*_GRID, *_ENGINE, "speculative_config"), "MODEL, without --base-url")
        result = _bench_there(options)
        _show_load(result, json_file)
    console.write_json(result, json_file)


def _numbers(flag: str, words: list[str] | None, default: int) -> list[int]:
    """The numbers of an option that takes commas and repetition."""
    try:
        return [int(part) for word in words for part in word.split(",")] if words else [default]
    except ValueError:
        raise InputError(f"{flag} takes whole numbers such as 128,512, not {','.join(words or ())}") from None


def _bench_here(options: dict[str, Any]) -> dict[str, Any]:
    from llmopt.bench.in_process import bench_model, grid
    from llmopt.engine.speculation.config import SpeculativeConfig

    cases = grid(
        _numbers("--prompt-len", options["prompt_len"], 512),
        _numbers("--gen-len", options["gen_len"], 128),
        _numbers("--batch", options["batch"], 1),
    )
    of_engine = {name: options[name] for name in _ENGINE}
    of_engine["speculative_config"] = SpeculativeConfig.parse(options["speculative_config"])
    with console.progress_bar() as progress:
        return bench_model(options["model"], cases, options["repeats"], options["seed"], progress, **of_engine)


def _bench_there(options: dict[str, Any]) -> dict[str, Any]:
    import asyncio
    from dataclasses import fields

    from llmopt.bench.metrics import parse_goodput
    from llmopt.bench.stream import Target
    from llmopt.bench.workload import Workload, bench_server

    if options["model_name"] is None:
        raise InputError("give the model's name on the server: --model NAME")
    limits = parse_goodput([part for word in options["goodput"] or () for part in word.replace(",", " ").split()])
    target = Target(
        options["base_url"],
        options["model_name"],
        api_key=options["api_key"],
        ignore_eos=options["ignore_eos"],
        timeout=options["timeout"],
    )
    workload = Workload(**{field.name: options[field.name] for field in fields(Workload)})
    with _live_counters(workload.num_prompts) as watch:
        return asyncio.run(bench_server(target, workload, limits, watch))


@contextmanager
def _live_counters(total: int) -> Iterator[Callable[["RequestTrace"], None]]:
    """A progress bar over requests, with what failed and the output tokens so far."""
    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[failed]} failed"),
               TextColumn("{task.fields[tokens]} output tokens"), TimeElapsedColumn(), TextColumn("left"),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console.errors, transient=True) as bar:
        task = bar.add_task("", total=total, failed=0, tokens=0)
        failed = tokens = 0

        def watch(trace: "RequestTrace") -> None:
            nonlocal failed, tokens
            failed += not trace.ok
            tokens += trace.output_tokens
            bar.update(task, advance=1, failed=failed, tokens=tokens)

        yield watch


def _show_runs(result: dict[str, Any], json_file: str | None) -> None:
    out = console.output(json_file)
    table = Table("phase", title=Text(f"{result['model']}: tokens per second, TTFT in ms, share of the memory's limit"))
    for heading in ("batch", "in", "out", "median", "min", "max", "TTFT", "share"):
        table.add_column(heading, justify="right")
    for run in result["runs"]:
        shape = (str(run[name]) for name in ("batch", "prompt_len", "gen_len"))
        speeds = (f"{run['tokens_per_s'][name]:.1f}" for name in ("median", "min", "max"))
        ttft = f"{run['ttft_ms']['median']:.1f}" if "ttft_ms" in run else ""
        share = f"{run['of_memory_limit']:.0%}" if "of_memory_limit" in run else ""
        table.add_row(run["phase"], *shape, *speeds, ttft, share)
    out.print(table)
    for run in result["runs"]:
        if "speculation" in run:
            _show_speculation(out, run)
    machine = result["machine"]
    out.print(
        f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, memory {machine['memory_gb_per_s']:.1f} GB/s, "
        f"weights {result['weight_bytes'] / 1e6:.1f} MB",
        highlight=False,
    )


def _show_speculation(out: Console, run: dict[str, Any]) -> None:
    drafted = run["speculation"]
    share = drafted["accepted_tokens"] / max(1, drafted["draft_tokens"])
    out.print(
        f"batch {run['batch']}, {run['prompt_len']} in, {run['gen_len']} out: {drafted['draft_tokens']} drafted, "
        f"{share:.0%} accepted; by position {drafted['accepted_by_position']}",
        highlight=False,
    )


def _show_load(result: dict[str, Any], json_file: str | None) -> None:
    from llmopt.bench.metrics import LATENCIES

    out = console.output(json_file)
    table = Table("milliseconds", title=Text(f"{result['model']} at {result['base_url']}"))
    for heading in ("mean", "p50", "p90", "p99"):
        table.add_column(heading, justify="right")
    for name in LATENCIES:
        if result[name] is not None:
            table.add_row(name.removesuffix("_ms"), *(f"{result[name][p]:.2f}" for p in ("mean", "p50", "p90", "p99")))
    out.print(table)
    requests = result["requests"]
    out.print(
        f"{requests['ok']} of {requests['total']} requests answered, {requests['failed']} failed, "
        f"in {result['seconds']:.2f} s",
        highlight=False,
    )
    for name in ("output_tokens_per_s", "output_tokens_per_s_per_gpu", "tokens_per_s_per_user", "goodput"):
        if result[name] is not None:
            out.print(f"{name}: {result[name]:.2f}", highlight=False)
    for error, count in result["errors"].items():
        out.print(f"failed {count} times: {error}", style="red", markup=False, highlight=False)
    for name, meaning in result["meanings"].items():
        if result[name] is not None:
            out.print(f"{name}: {meaning}", style="dim", markup=False, highlight=False)
