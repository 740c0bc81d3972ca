"""Lets real peers read our artifacts and prints who could: `make interop`.

    python tests/interop/matrix.py [--only PART]... [--text FILE]

PART is part of a cell's name, PEER/FORMAT/SCHEME. Writes build/interop.json: {cells: [{peer, format, scheme, pass,
known, detail}]}, where `known` says that a failing cell fails by a fault of the peer that cells.py describes, and was
seen to do so again. Exit status 1 says that another cell failed, or that a fault described there is gone.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cells import CELLS, HELP, KNOWN_FAULTS, WRITTEN, Cell
from environments import HERE, make
from rich.console import Console
from rich.markup import escape
from rich.table import Table

BUILD = HERE.parents[1] / "build"
WORK = BUILD / "interop"
TIMEOUT = 1200  # seconds for a cell; a machine that is busy with other work needs several minutes for the slowest
_LAST = 3000  # characters of a failure's output that are kept
_SHOWN = 500  # characters of a detail that the table shows; the whole is in the JSON


def main() -> int:
    options = _options()
    cells = [cell for cell in CELLS if not options.only or any(part in cell.name for part in options.only)]
    if not cells:
        print(f"no cell is named like {', '.join(options.only)}; there are {', '.join(c.name for c in CELLS)}")
        return 2
    for environment in dict.fromkeys(cell.environment for cell in cells):
        make(environment)
    WORK.mkdir(parents=True, exist_ok=True)
    text = options.text or _write_text()
    written: dict[Path, str | None] = {}
    results = []
    for number, cell in enumerate(cells, 1):
        results.append(_run(cell, text, written))
        print(
            f"{number}/{len(cells)} {cell.name}: {_verdict(results[-1])}: {results[-1]['detail'][-_SHOWN:]}", flush=True
        )
    (BUILD / "interop.json").write_text(json.dumps({"cells": results}, indent=2) + "\n", "utf-8")
    _show(results)
    return int(any(_is_surprise(cell, result) for cell, result in zip(cells, results, strict=True)))


def _is_surprise(cell: Cell, result: dict[str, Any]) -> bool:
    return cell in KNOWN_FAULTS if result["pass"] else not result["known"]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", default=[], help="part of a cell's name; may be repeated")
    parser.add_argument("--text", type=Path, help="UTF-8 text to predict instead of the built-in one")
    return parser.parse_args()


def _write_text() -> Path:
    from llmopt.model.builtin_text import builtin_text

    path = WORK / "text.txt"
    path.write_text(builtin_text(), "utf-8")
    return path


def _run(cell: Cell, text: Path, written: dict[Path, str | None]) -> dict[str, Any]:
    """One cell's result; artifacts that it needs are written once and noted in `written` with what went wrong."""
    artifact = WORK / f"{cell.format}-{cell.scheme}{'.gguf' if cell.format == 'gguf' else ''}"
    if cell.scheme != WRITTEN and artifact not in written:
        written[artifact] = _write_artifact(cell, artifact)
    problem = written.get(artifact)
    if problem is not None:
        outcome = {"pass": False, "detail": f"ours: llmopt quantize failed: {problem}"}
    else:
        outcome = _run_cell(cell, artifact, text)
    fault = KNOWN_FAULTS.get(cell)
    known = not outcome["pass"] and fault is not None and fault.evidence in outcome["detail"]
    if known:
        outcome["detail"] = f"the peer's: {fault.reason}. Seen: {outcome['detail']}"
    elif outcome["pass"] and fault is not None:
        outcome["detail"] = f"passes, although cells.py says that {fault.reason}: {outcome['detail']}"
    if cell.peer in HELP and cell.scheme != WRITTEN:
        outcome["detail"] += f"; with help: {HELP[cell.peer]}"
    return {**asdict(cell), "pass": outcome["pass"], "known": known, "detail": outcome["detail"]}


def _write_artifact(cell: Cell, artifact: Path) -> str | None:
    command = [sys.executable, "-m", "llmopt.cli.main", "quantize", "smollm2", "--method", "rtn", "--overwrite"]
    options = ["--scheme", cell.scheme, "--format", cell.format, "--output", str(artifact)]
    return _problem([*command, *options])


def _run_cell(cell: Cell, artifact: Path, text: Path) -> dict[str, Any]:
    result = WORK / f"{cell.name.replace('/', '-')}.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / "cell.py"), cell.name, str(artifact), str(text), str(result)]
    problem = _problem(command)
    return json.loads(result.read_text("utf-8")) if problem is None else {"pass": False, "detail": problem}


def _problem(command: list[str]) -> str | None:
    """Run a command; None where it succeeded, else the end of what it said."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, errors="replace")
    except subprocess.TimeoutExpired:
        return f"not done after {TIMEOUT} s"
    return None if done.returncode == 0 else f"exit status {done.returncode}: {done.stderr[-_LAST:]}"


def _verdict(result: dict[str, Any]) -> str:
    return "pass" if result["pass"] else "known fault of the peer" if result["known"] else "FAIL"


def _show(results: list[dict[str, Any]]) -> None:
    table = Table("peer", "format", "scheme", "", "detail", title="Who reads what")
    for result in results:
        style = "green" if result["pass"] else "yellow" if result["known"] else "red"
        cells = [escape(result[column]) for column in ("peer", "format", "scheme")]
        table.add_row(*cells, f"[{style}]{_verdict(result)}[/]", escape(result["detail"][:_SHOWN]))
    Console().print(table, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
