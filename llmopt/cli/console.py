"""What every subcommand shares in talking to its user: tables, progress, JSON, one-line errors."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


@contextmanager
def progress_bar() -> Iterator[progress_type.Progress]:
    """A progress bar with the time left, on standard error; it leaves nothing behind when it ends."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task("", total=None)
        current = ""

        def show(phase: str, done: int, total: int) -> None:
            nonlocal current
            if phase != current:
                current = phase
                bar.reset(task, description=phase, total=total, completed=done)
            else:
                bar.update(task, completed=done, total=total)

        yield show
