"""`llmopt eval`: read the options, measure, show the numbers and the gates' verdicts."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from llmopt.cli import console
from llmopt.engine.config import BackendName, DeviceName, DTypeName, KVCacheDTypeName
from llmopt.errors import InputError

_MODEL = "A folder, a .gguf file, a hub id, or smollm2"
_ROWS = (
    ("perplexity", "perplexity.value"),
    ("perplexity / reference's", "perplexity.ratio"),
    ("mean KL divergence, nats", "divergence.mean_kl"),
    ("99th percentile of KL, nats", "divergence.p99_kl"),
    ("top-1 agreement", "divergence.top1"),
)


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"{_MODEL}.")],
    reference: Annotated[
        str | None, typer.Option(help=f"{_MODEL}; it runs in float32 on plain torch, which is taken for the truth.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A UTF-8 text that was not used for calibration; by default Python's manual.")
    ] = None,
    ctx: Annotated[int, typer.Option(help="Tokens in a window.")] = 1024,
    windows: Annotated[int, typer.Option(help="Windows to measure; more of them give narrower intervals.")] = 16,
    gate: Annotated[
        Path | None,
        typer.Option(help="YAML with bounds. Exit status 1 where one is broken, 4 where that is not certain."),
    ] = None,
    junit: Annotated[Path | None, typer.Option(help="Write the gates' verdicts as JUnit XML.")] = None,
    backend: Annotated[BackendName, typer.Option(help="What computes MODEL.")] = "auto",
    device: Annotated[DeviceName, typer.Option(help="Where both compute.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads; by default one a core.")] = None,
    dtype: Annotated[
        DTypeName,
        typer.Option(
            help="Of MODEL's activations: float32 measures what the artifact holds, auto what serve makes of it."
        ),
    ] = "float32",
    kv_cache_dtype: Annotated[
        KVCacheDTypeName, typer.Option(help="Of MODEL's KV cache; auto is as the activations.")
    ] = "auto",
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON; - for standard output.")
    ] = None,
) -> None:
    """Measure a model's quality, and how far it is from its unquantized reference.

    Example: llmopt eval out/smollm2-gptq --reference smollm2 --gate recipes/gates/demo.yaml
    """
    if junit is not None and gate is None:
        raise InputError("--junit reports gates; give --gate FILE.yaml as well")
    from llmopt.evaluate.evaluate import evaluate as run
    from llmopt.evaluate.gates import exit_status
    from llmopt.evaluate.junit import write_junit

    with console.progress_bar() as progress:
        result = run(
            model,
            reference=reference,
            text=text,
            ctx=ctx,
            windows=windows,
            gates=gate,
            backend=backend,
            device=device,
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            threads=threads,
            progress=progress,
        )
    _show(result, json_file)
    console.write_json(result, json_file)
    if junit is not None:
        write_junit(result, junit)
    raise typer.Exit(exit_status(result["gates"]))


def _show(result: dict[str, Any], json_file: str | None) -> None:
    out = console.output(json_file)
    table = Table("", title=Text(f"{result['model']} against {result['reference'] or 'no reference'}"))
    for heading in ("value", f"{result['confidence']:.0%} interval", "reference"):
        table.add_column(heading, justify="right")
    for label, metric in _ROWS:
        group, _, name = metric.partition(".")
        if metric in result["intervals"]:
            beside = result["perplexity"]["reference"] if metric == "perplexity.value" else None
            numbers = f"{result[group][name]:.4g}", _interval(result["intervals"][metric])
            table.add_row(label, *numbers, "" if beside is None else f"{beside:.4g}")
    out.print(table)
    text = result["text"]
    opening = "each begins with" if text["bos"] else "without"
    out.print(
        f"{text['windows']} windows of {text['ctx']} tokens of {text['source']}, {opening} an opening token",
        markup=False,
        highlight=False,
    )
    console.show_verdicts(out, result["gates"])


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.4g} to {interval[1]:.4g}"
