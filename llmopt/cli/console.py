"""What every subcommand shares in talking to its user: tables, progress, JSON, one-line errors."""

import json
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from llmopt import progress as progress_type
from llmopt.errors import InputError

errors = Console(stderr=True)


def output(json_file: str | None) -> Console:
    """Where tables go: standard output, or standard error when `--json -` has taken standard output."""
    return errors if json_file == "-" else Console()


def write_json(result: dict[str, Any], json_file: str | None) -> None:
    """Write the whole result to the file of `--json`, `-` for standard output, None for nowhere."""
    if json_file is None:
        return
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    if json_file == "-":
        sys.stdout.write(text)
        return
    try:
        Path(json_file).write_text(text)
    except OSError as error:
        raise InputError(f"cannot write {json_file}: {error.strerror}") from None


def is_given(context: typer.Context, name: str) -> bool:
    """Whether the parameter of this name was given on the command line, rather than left at its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def refuse(context: typer.Context, names: Collection[str], needs: str) -> None:
    """Raise InputError for an option that was given and would do nothing."""
    for parameter in context.command.params:
        if parameter.name in names and is_given(context, parameter.name):
            raise InputError(f"{parameter.opts[0]} only goes with {needs}")


def show_verdicts(out: Console, gates: list[dict[str, Any]]) -> None:
    """A line for each gate: what was found, and whether it passes; of which artifact, where there are several."""
    from llmopt.evaluate.junit import explain

    several = len({verdict.get("output") for verdict in gates}) > 1
    for verdict in gates:
        style = {"pass": "green", "fail": "red", "inconclusive": "yellow"}[verdict["verdict"]]
        name = f"{verdict['output']}: {verdict['name']}" if several else verdict["name"]
        out.print(f"{verdict['verdict']}: {name}: {explain(verdict)}", style=style, markup=False, highlight=False)


@contextmanager
def progress_bar() -> Iterator[progress_type.Progress]:
    """A progress bar with the time left, on standard error; it leaves nothing behind when it ends."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def show(phase: str, done: int, total: int) -> None:
            if done == 0:  # a new phase: its time left is not that of the one before
                bar.reset(task, total=total)
            bar.update(task, description=phase, completed=done, total=total)

        yield show
