"""What `llmopt bench` shows of each kind of result; the results are the objects that `--json` writes."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmopt.cli import console


def show_runs(result: dict[str, Any], json_file: str | None) -> None:
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
    out.print(f"{_machine(result)}, weights {result['weight_bytes'] / 1e6:.1f} MB", highlight=False)


def _show_speculation(out: Console, run: dict[str, Any]) -> None:
    drafted = run["speculation"]
    share = drafted["accepted_tokens"] / max(1, drafted["draft_tokens"])
    out.print(
        f"batch {run['batch']}, {run['prompt_len']} in, {run['gen_len']} out: {drafted['draft_tokens']} drafted, "
        f"{share:.0%} accepted; by position {drafted['accepted_by_position']}",
        highlight=False,
    )


def show_load(result: dict[str, Any], json_file: str | None) -> None:
    from llmopt.bench.metrics import LATENCIES

    out = console.output(json_file)
    where = f"at {result['base_url']}" if "base_url" in result else "in this process"
    table = Table("milliseconds", title=Text(f"{result['model']} {where}"))
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


def show_ablation(result: dict[str, Any], json_file: str | None) -> None:
    out = console.output(json_file)
    rate = f"{result['request_rate']:.3g} requests/s, burstiness {result['burstiness']:g}"
    table = Table("", title=Text(f"{result['model']}: {result['num_prompts']} requests at {rate}"))
    for heading in ("tokens/s", "of all on", "TTFT p50", "p99", "ITL p50", "p99", "whole p50"):
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        latencies = (("ttft_ms", "p50"), ("ttft_ms", "p99"), ("itl_ms", "p50"), ("itl_ms", "p99"), ("e2e_ms", "p50"))
        shown = ("" if row[name] is None else f"{row[name][key]:.4g}" for name, key in latencies)
        table.add_row(row["name"], f"{row['output_tokens_per_s']:.1f}", f"{row['of_all_on']:.2f}", *shown)
    out.print(table)
    out.print(
        f"Latencies in ms, medians of {result['repeats']} rounds; whole is a request from its arrival to its end."
    )
    out.print(_machine(result), highlight=False)


def show_profile(result: dict[str, Any], json_file: str | None) -> None:
    out = console.output(json_file)
    table = Table("phase", title=Text(f"{result['model']}: a step of {result['batch']} streams"))
    for heading in ("ms", "share"):
        table.add_column(heading, justify="right")
    for phase in result["phases"]:
        table.add_row(phase["name"], f"{phase['ms']:.3f}", f"{phase['share']:.1%}")
    table.add_section()
    table.add_row("step", f"{result['step_ms']:.3f}", "")
    out.print(table)
    read = {name: f"{count / 1e6:.1f} MB" for name, count in result["bytes"].items()}
    lines = (
        f"schedule, sample and detokenize: {result['overhead']:.1%} of a step; mean of {result['steps']} steps",
        f"a step reads {read['total']}: weights {read['weights']}, keys and values {read['kv']}",
        f"{result['gb_per_s']:.1f} GB/s while it computes, {result['of_memory_limit']:.0%} of the memory's limit",
        _machine(result),
    )
    for line in lines:
        out.print(line, highlight=False)


def show_stall(result: dict[str, Any], json_file: str | None) -> None:
    out = console.output(json_file)
    title = f"{result['model']}: {result['streams']} streams decode and a prompt of {result['prompt_len']} tokens comes"
    table = Table("prompt taken in", title=Text(title))
    for heading in ("steps", "usual gap", "p99 gap", "worst gap", "worst / usual", "TTFT"):
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        values = (f"{row[name]['median']:.1f}" for name in ("median_ms", "p99_ms", "worst_ms", "ratio", "ttft_ms"))
        table.add_row(row["name"], f"{row['steps']['median']:.0f}", *values)
    out.print(table)
    out.print(f"Gaps between a stream's tokens, and TTFT of the prompt, in ms; medians of {result['repeats']} rounds.")
    out.print(_machine(result), highlight=False)


def _machine(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, memory {machine['memory_gb_per_s']:.1f} GB/s"
