"""What the rounds add up to: the rows of the comparison with their ratios, and the table that shows them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

ROW_HEADINGS = ("model", "case", "llmopt", "tokens/s", "of memory limit", "against", "best", "tokens/s", "ratio",
                "the others")  # fmt: skip
ENGINE_HEADINGS = ("model", "engine", "weights, MB", "head", "settings")


@dataclass(frozen=True)
class Case:
    """One thing to time: the prefill of one prompt where gen_len is 0, else the decoding of a batch."""

    batch: int
    prompt_len: int
    gen_len: int

    @property
    def is_prefill(self) -> bool:
        return self.gen_len == 0

    @property
    def repeats(self) -> int:
        """In one turn of an engine, of which the median counts; a batch takes long enough to be measured once."""
        return 3 if self.batch == 1 else 1

    @property
    def name(self) -> str:
        return f"prefill-{self.prompt_len}" if self.is_prefill else f"decode-{self.batch}"


@dataclass(frozen=True)
class Row:
    """One comparison: what llmopt reaches in a case, and which peers it is to be measured against.

    Attributes:
        llmopt: the name of the engine that is llmopt with one of its artifacts.
        peers: names of the other engines.
        against: the peers in words.
    """

    model: str
    case: Case
    llmopt: str
    peers: tuple[str, ...]
    against: str


Measured = Mapping[tuple[str, Case, str], Sequence[float]]
"""Tokens per second of each round, by model, case and engine."""


def row_result(row: Row, measured: Measured, weight_bytes: int, bandwidth: float) -> dict[str, Any] | None:
    """The JSON of a row: medians over rounds, and the ratio of llmopt's to that of the best peer; above 1 llmopt is
    the faster. None where one of its engines has not been measured: without its best peer a ratio would flatter.

    Where tokens are decoded it says how near llmopt came to the memory's limit, batch * bandwidth / weight_bytes, since
    each step reads llmopt's weights once.
    """
    rounds = {engine: measured.get((row.model, row.case, engine), ()) for engine in (row.llmopt, *row.peers)}
    if not row.peers or not all(rounds.values()):
        return None
    medians = {engine: median(speeds) for engine, speeds in rounds.items()}
    speed = medians.pop(row.llmopt)
    best = max(medians, key=medians.__getitem__)
    limit = None if row.case.is_prefill else row.case.batch * bandwidth / weight_bytes
    return {
        "model": row.model,
        "case": row.case.name,
        "engine": row.llmopt,
        "against": row.against,
        "llmopt": speed,
        "peers": medians,
        "best_peer": best,
        "ratio": speed / medians[best],
        "of_memory_limit": None if limit is None else speed / limit,
        "rounds": {engine: list(speeds) for engine, speeds in rounds.items()},
        "range": {engine: {"min": min(speeds), "max": max(speeds)} for engine, speeds in rounds.items()},
    }


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
    others = ", ".join(f"{name} {speed:,.0f}" for name, speed in row["peers"].items() if name != best)
    share = "" if row["of_memory_limit"] is None else f"{row['of_memory_limit']:.0%}"
    ours, theirs = _speed(row["llmopt"], row["range"][row["engine"]]), _speed(row["peers"][best], row["range"][best])
    ratio = f"**{row['ratio']:.2f}**"
    return [row["model"], row["case"], row["engine"], ours, share, row["against"], best, theirs, ratio, others]


def _engine_cells(engine: Mapping[str, Any]) -> list[str]:
    size = f"{engine['weight_bytes'] / 1e6:.1f}"
    return [engine["model"], engine["engine"], size, engine["head"], engine["settings"]]


def _speed(median: float, spread: Mapping[str, float]) -> str:
    return f"{median:,.0f} ({spread['min']:,.0f}–{spread['max']:,.0f})"
