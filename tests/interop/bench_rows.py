"""What the rounds add up to: the rows of the comparison with their ratios, and the table that shows them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

ROW_HEADINGS = ("model", "case", "llmopt", "tokens/s", "of memory limit", "against", "best", "tokens/s", "ratio",
                "the others")  # fmt: skip
ENGINE_HEADINGS = ("model", "engine", "weights, MB", "head", "settings")


@dataclass(frozen=True)
class Case:
    """One thing to time: the prefill of one prompt where gen_len is 0, else the decoding of a batch. With a client it
    is whole requests through HTTP, as many at once as the batch is wide.

    Attributes:
        client: the program that sends the requests; None where an engine measures itself.
    """

    batch: int
    prompt_len: int
    gen_len: int
    client: str | None = None

    @property
    def is_prefill(self) -> bool:
        return self.gen_len == 0

    @property
    def requests(self) -> int:
        """Sent in one turn of a server."""
        return 4 * self.batch

    @property
    def repeats(self) -> int:
        """In one turn of an engine, of which the median counts; a batch takes long enough to be measured once."""
        return 3 if self.batch == 1 else 1

    @property
    def name(self) -> str:
        if self.client is not None:
            return f"http-{self.batch}/{self.client}"
        return f"prefill-{self.prompt_len}" if self.is_prefill else f"decode-{self.batch}"

    def memory_limit(self, weight_bytes: int, bandwidth: float) -> float | None:
        """Tokens per second if a step took no longer than it takes to read the weights once; None for what is not
        decoding alone. `bandwidth` is in bytes per second."""
        if self.is_prefill or self.client is not None:
            return None
        return self.batch * bandwidth / weight_bytes


@dataclass(frozen=True)
class Speed:
    """What one turn of an engine showed.

    Attributes:
        requests: sent through HTTP; 0 where an engine measured itself.
        failed: how often requests failed, by what was said of it.
    """

    tokens_per_s: float
    requests: int = 0
    failed: Mapping[str, int] = field(default_factory=dict)

    @property
    def failures(self) -> int:
        return sum(self.failed.values())


@dataclass(frozen=True)
class Row:
    """One comparison: what llmopt reaches in a case, and which peers it is to be measured against.

    Attributes:
        llmopt: the name of the engine that is llmopt with one of its artifacts.
        peers: names of the other engines.
        against: the peers in words.
        title: the row's name where it is not the case's.
    """

    model: str
    case: Case
    llmopt: str
    peers: tuple[str, ...]
    against: str
    title: str | None = None


Measured = Mapping[tuple[str, Case, str], Sequence[Speed]]
"""What each round showed, by model, case and engine."""


def row_result(row: Row, measured: Measured, weight_bytes: int, bandwidth: float) -> dict[str, Any] | None:
    """The JSON of a row: medians over rounds, and the ratio of llmopt's to that of the best peer; above 1 llmopt is
    the faster. None where one of its engines has not been measured: without its best peer a ratio would flatter.

    Where tokens are decoded it says how near llmopt came to the memory's limit, since each step reads llmopt's weights
    once. Of requests through HTTP it says how many each engine was sent in all rounds, and how many failed; those
    brought no tokens, but their time is in the speed.
    """
    turns = {engine: measured.get((row.model, row.case, engine), ()) for engine in (row.llmopt, *row.peers)}
    if not row.peers or not all(turns.values()):
        return None
    rounds = {engine: [turn.tokens_per_s for turn in taken] for engine, taken in turns.items()}
    medians = {engine: median(speeds) for engine, speeds in rounds.items()}
    speed = medians.pop(row.llmopt)
    best = max(medians, key=medians.__getitem__)
    limit = row.case.memory_limit(weight_bytes, bandwidth)
    return {
        "model": row.model,
        "case": row.title or row.case.name,
        "engine": row.llmopt,
        "against": row.against,
        "llmopt": speed,
        "peers": medians,
        "best_peer": best,
        "ratio": speed / medians[best],
        "of_memory_limit": None if limit is None else speed / limit,
        "requests": {engine: _requests(taken) for engine, taken in turns.items() if taken[0].requests},
        "rounds": rounds,
        "range": {engine: {"min": min(speeds), "max": max(speeds)} for engine, speeds in rounds.items()},
    }


def _requests(turns: Sequence[Speed]) -> dict[str, int]:
    return {"total": sum(turn.requests for turn in turns), "failed": sum(turn.failures for turn in turns)}


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown: its rows, the machine, and what each engine ran."""
    rows = _table(ROW_HEADINGS, map(_row_cells, report["rows"]))
    engines = _table(ENGINE_HEADINGS, map(_engine_cells, report["engines"]))
    return f"{rows}\n{_conditions(report)}\n\n{engines}"


def _conditions(report: Mapping[str, Any]) -> str:
    machine, busy = report["machine"], report["busy_elsewhere"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores: reads {machine['memory_gb_per_s']:.1f} GB/s, torch's float32 "
        f"product reaches {machine['float32_gflops']:.0f} GFLOPS. Medians of {report['rounds']} rounds, least and "
        f"greatest in brackets. Just before each, others used {busy['median']:.0f}% of the processor (median; at most "
        f"{busy['max']:.0f}%)."
    )


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _row_cells(row: Mapping[str, Any]) -> list[str]:
    best = row["best_peer"]
    others = ", ".join(
        f"{name} {speed:,.0f}{_failures(row, name)}" for name, speed in row["peers"].items() if name != best
    )
    share = "" if row["of_memory_limit"] is None else f"{row['of_memory_limit']:.0%}"
    ours, theirs = _speed(row, row["engine"], row["llmopt"]), _speed(row, best, row["peers"][best])
    ratio = f"**{row['ratio']:.2f}**"
    return [row["model"], row["case"], row["engine"], ours, share, row["against"], best, theirs, ratio, others]


def _engine_cells(engine: Mapping[str, Any]) -> list[str]:
    size = f"{engine['weight_bytes'] / 1e6:.1f}"
    return [engine["model"], engine["engine"], size, engine["head"], engine["settings"]]


def _speed(row: Mapping[str, Any], engine: str, median: float) -> str:
    spread = row["range"][engine]
    return f"{median:,.0f} ({spread['min']:,.0f}–{spread['max']:,.0f}){_failures(row, engine)}"


def _failures(row: Mapping[str, Any], engine: str) -> str:
    """That requests failed belongs beside every speed that was reached without them."""
    requests = row["requests"].get(engine, {"failed": 0})
    return f", {requests['failed']} of {requests['total']} requests failed" if requests["failed"] else ""
