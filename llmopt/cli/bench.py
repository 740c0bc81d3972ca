"""`llmopt bench`: read the options, measure a model here or a server elsewhere, show the numbers."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from llmopt.cli import bench_tables, console
from llmopt.engine.config import BackendName, BatchingName, DeviceName, DTypeName, KVCacheDTypeName
from llmopt.errors import InputError

if TYPE_CHECKING:
    from llmopt.bench.metrics import RequestTrace
    from llmopt.bench.workload import Workload

_HERE = "Of a model in this process"
_LOAD = "Of a load: on MODEL with --request-rate or --ablate, on a server with --base-url"
_THERE = "Of a server"
_GRID = ("prompt_len", "gen_len", "batch", "repeats")
_ENGINE = ("backend", "device", "threads", "dtype", "kv_cache_dtype", "kv_cache_memory_bytes", "max_num_batched_tokens",
           "speculative_config")  # fmt: skip
_SCHEDULER = ("max_num_seqs", "batching", "batching_window", "chunked_prefill_size", "enable_prefix_caching")
_OF_A_LOAD = ("dataset_name", "dataset_path", "input_len", "output_len", "random_range_ratio", "random_prefix_len",
              "num_prompts", "request_rate", "burstiness", "num_warmups")  # fmt: skip
_OF_A_SERVER = ("model_name", "api_key", "tokenizer", "ignore_eos", "num_gpus", "timeout")
_GOES_WITH = {
    "MODEL": (*_GRID, *_ENGINE),
    "--request-rate": (*_OF_A_LOAD, "max_concurrency", "goodput", *_ENGINE, *_SCHEDULER),
    "--ablate": ("ablate", *_OF_A_LOAD, "repeats", *_ENGINE, *_SCHEDULER),
    "--profile": ("profile", "prompt_len", "gen_len", "batch", *_ENGINE),
    "--stall": ("stall", "prompt_len", "batch", "repeats", "chunked_prefill_size", *_ENGINE),
    "--base-url": ("base_url", *_OF_A_LOAD, "max_concurrency", "goodput", *_OF_A_SERVER),
}
"""What is measured, by what asks for it, and the options that count then."""


def _here(*names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=_HERE, **more)


def _load(*names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=_LOAD, **more)


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
    chunked_prefill_size: Annotated[
        int | None,
        _here(help="Tokens of prompts in a step that also decodes, at most; see serve."),
    ] = None,
    max_num_seqs: Annotated[int, _here(help="Requests that run at once, of a load.")] = 64,
    batching: Annotated[BatchingName, _here(help="When a request is let in, of a load.")] = "continuous",
    batching_window: Annotated[
        float | None, _here(help="Milliseconds that dynamic batching waits for a batch to fill.  [100]")
    ] = None,
    enable_prefix_caching: Annotated[bool, _here(help="Compute the beginning that prompts share once.")] = True,
    ablate: Annotated[
        bool, _here("--ablate", help="Turn each technique of the engine off in turn under one load.")
    ] = False,
    profile: Annotated[
        bool, _here("--profile", help="Time by phase of decoding steps, and bytes read.  [-b 32 -p 128 -n 128]")
    ] = False,
    stall: Annotated[
        bool,
        _here("--stall", help="How long streams wait while a long prompt is taken in.  [-b 16 -p 4000]"),
    ] = False,
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
        Literal["random", "custom"], _load(help="Random prompts, or those of --dataset-path.")
    ] = "random",
    dataset_path: Annotated[
        Path | None,
        _load(help='JSONL with {"prompt": TEXT} a line, and "max_tokens" if it differs from --output-len.'),
    ] = None,
    tokenizer: Annotated[
        str | None,
        _there(
            help="MODEL whose tokens random prompts are drawn from, to send exactly --input-len of them; without it "
            "--input-len counts random English words."
        ),
    ] = None,
    input_len: Annotated[int | None, _load(help="Length of a random prompt.  [512]")] = None,
    output_len: Annotated[int, _load(help="Tokens to generate.")] = 128,
    random_range_ratio: Annotated[
        float, _load(help="Random lengths are drawn from 1 - this to 1 + this times the ones given.")
    ] = 0.0,
    random_prefix_len: Annotated[
        int, _load(help="Tokens, or words, that come before every random prompt and are the same.")
    ] = 0,
    num_prompts: Annotated[int, _load(help="Requests in all.")] = 100,
    request_rate: Annotated[float, _load(help="Requests per second; inf sends all at once.")] = math.inf,
    burstiness: Annotated[
        float | None, _load(help="Of a finite rate: 1 is a Poisson process, less is burstier, more is steadier.  [1]")
    ] = None,
    max_concurrency: Annotated[int | None, _load(help="Requests in flight, at most.")] = None,
    num_warmups: Annotated[int, _load(help="Requests that are sent first and not measured.")] = 1,
    ignore_eos: Annotated[
        bool, _there(help="Ask for --output-len tokens whatever the model says. Not every server knows this extension.")
    ] = True,
    goodput: Annotated[
        list[str] | None,
        _load(help="Count requests that keep limits in ms, such as ttft:500,tpot:50 (or e2el); may be repeated."),
    ] = None,
    num_gpus: Annotated[int, _there(help="GPUs of the server, for throughput per GPU.")] = 0,
    timeout: Annotated[float, _there(help="Seconds that a request may take.")] = 600.0,
    seed: Annotated[int, typer.Option(help="Seeds the prompts and the arrivals.")] = 0,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON; - for standard output.")
    ] = None,
) -> None:
    """Measure speed: of MODEL in this process, or of a server with --base-url.

    MODEL alone is measured over a grid of batch sizes and lengths; with --request-rate under a load whose requests come
    at their times; with --ablate, --profile or --stall as these say.

    Example: llmopt bench smollm2 -p 128,512 -n 64 -b 1,8

    Example: llmopt bench smollm2 --request-rate 4 --input-len 128 --output-len 64 --batching static

    Example: llmopt bench --base-url http://127.0.0.1:8000 --model smollm2 --tokenizer smollm2 --max-concurrency 8
    """
    options = dict(context.params)
    if (model is None) == (base_url is None):
        raise InputError("give either MODEL, to measure it in this process, or --base-url URL, to measure a server")
    measured = _what_is_measured(context, options)
    run, show = _MEASUREMENTS[measured]
    result = run(context, options)
    show(result, json_file)
    console.write_json(result, json_file)


def _what_is_measured(context: typer.Context, options: dict[str, Any]) -> str:
    """One of _GOES_WITH. Raises InputError for options that do not go with it."""
    switches = [switch for switch in ("--ablate", "--profile", "--stall") if options[switch[2:]]]
    if len(switches) > 1:
        raise InputError(f"{' and '.join(switches)} are measured one at a time; give one of them")
    if options["base_url"] is not None:
        measured = "--base-url"
    elif switches:
        measured = switches[0]
    else:
        measured = "--request-rate" if console.is_given(context, "request_rate") else "MODEL"
    for name in {name for names in _GOES_WITH.values() for name in names} - set(_GOES_WITH[measured]):
        needs = [other for other, names in _GOES_WITH.items() if name in names]
        console.refuse(context, [name], " or ".join(needs))
    return measured


def _numbers(flag: str, words: list[str] | None, default: int) -> list[int]:
    """The numbers of an option that takes commas and repetition."""
    try:
        return [int(part) for word in words for part in word.split(",")] if words else [default]
    except ValueError:
        raise InputError(f"{flag} takes whole numbers such as 128,512, not {','.join(words or ())}") from None


def _number(flag: str, words: list[str] | None, default: int) -> int:
    """The number of such an option where there can be but one."""
    numbers = _numbers(flag, words, default)
    if len(numbers) != 1 or numbers[0] < 1:
        raise InputError(f"{flag} takes one number of at least 1 here, not {','.join(words or ())}")
    return numbers[0]


def _engine(options: dict[str, Any], *more: str) -> dict[str, Any]:
    """The options of the engine."""
    from llmopt.engine.speculation.config import SpeculativeConfig

    drafting = SpeculativeConfig.parse(options["speculative_config"])
    return {name: options[name] for name in (*_ENGINE, *more)} | {"speculative_config": drafting}


def _bench_grid(context: typer.Context, options: dict[str, Any]) -> dict[str, Any]:
    from llmopt.bench.in_process import bench_model, grid

    cases = grid(
        _numbers("--prompt-len", options["prompt_len"], 512),
        _numbers("--gen-len", options["gen_len"], 128),
        _numbers("--batch", options["batch"], 1),
    )
    with console.progress_bar() as progress:
        return bench_model(options["model"], cases, options["repeats"], options["seed"], progress, **_engine(options))


def _bench_profile(context: typer.Context, options: dict[str, Any]) -> dict[str, Any]:
    from llmopt.bench.in_process import Case
    from llmopt.bench.profile import bench_profile

    case = Case(
        batch=_number("--batch", options["batch"], 32),
        prompt_len=_number("--prompt-len", options["prompt_len"], 128),
        gen_len=_number("--gen-len", options["gen_len"], 128),
    )
    with console.progress_bar() as progress:
        return bench_profile(options["model"], case, options["seed"], progress, **_engine(options))


def _bench_stall(context: typer.Context, options: dict[str, Any]) -> dict[str, Any]:
    from llmopt.bench.stall import bench_stall

    shape = _number("--batch", options["batch"], 16), _number("--prompt-len", options["prompt_len"], 4000)
    settings = _engine(options, "chunked_prefill_size")
    with console.progress_bar() as progress:
        return bench_stall(options["model"], *shape, options["repeats"], options["seed"], progress, **settings)


def _workload(options: dict[str, Any], **more: Any) -> "Workload":
    from dataclasses import fields

    from llmopt.bench.workload import Workload

    return Workload(**{field.name: options[field.name] for field in fields(Workload)} | more)


def _in_tokens(options: dict[str, Any]) -> dict[str, Any]:
    """Random prompts for a model in this process are of its own tokens."""
    return {"tokenizer": options["model"]} if options["dataset_name"] == "random" else {}


def _bench_load(context: typer.Context, options: dict[str, Any]) -> dict[str, Any]:
    from llmopt.bench.engine_load import bench_engine

    workload, limits = _workload(options, **_in_tokens(options)), _limits(options)
    settings = _engine(options, *_SCHEDULER)
    with console.progress_bar() as progress:
        return bench_engine(options["model"], workload, limits, progress, **settings)


def _bench_ablation(context: typer.Context, options: dict[str, Any]) -> dict[str, Any]:
    from llmopt.bench.ablation import LOAD, bench_ablation

    usual = {name: value for name, value in LOAD.items() if not console.is_given(context, name)}
    if options["dataset_name"] == "custom":
        usual = {}
    workload = _workload(options, **_in_tokens(options), **usual)
    settings = _engine(options, *_SCHEDULER)
    with console.progress_bar() as progress:
        return bench_ablation(options["model"], workload, options["repeats"], progress, **settings)


def _limits(options: dict[str, Any]) -> dict[str, float]:
    from llmopt.bench.metrics import parse_goodput

    return parse_goodput([part for word in options["goodput"] or () for part in word.replace(",", " ").split()])


def _bench_server(context: typer.Context, options: dict[str, Any]) -> dict[str, Any]:
    import asyncio

    from llmopt.bench.load import bench_server
    from llmopt.bench.stream import Target

    if options["model_name"] is None:
        raise InputError("give the model's name on the server: --model NAME")
    limits = _limits(options)
    target = Target(
        options["base_url"],
        options["model_name"],
        api_key=options["api_key"],
        ignore_eos=options["ignore_eos"],
        timeout=options["timeout"],
    )
    workload = _workload(options)
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


_MEASUREMENTS = {
    "MODEL": (_bench_grid, bench_tables.show_runs),
    "--request-rate": (_bench_load, bench_tables.show_load),
    "--ablate": (_bench_ablation, bench_tables.show_ablation),
    "--profile": (_bench_profile, bench_tables.show_profile),
    "--stall": (_bench_stall, bench_tables.show_stall),
    "--base-url": (_bench_server, bench_tables.show_load),
}
