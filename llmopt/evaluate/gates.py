"""Quality gates: bounds that a model's numbers must keep, with a verdict that knows how sure it is."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llmopt.errors import InputError
from llmopt.evaluate.statistics import Interval

Metric = Literal["perplexity.value", "perplexity.ratio", "divergence.mean_kl", "divergence.p99_kl", "divergence.top1"]
Verdict = Literal["pass", "fail", "inconclusive"]

NEEDS_NO_REFERENCE = "perplexity.value"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Gate(_Strict):
    """One bound on one metric: `max` for those where less is better, `min` for top-1 agreement."""

    name: str = Field(min_length=1)
    metric: Metric
    max: float | None = None
    min: float | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> "Gate":
        if (self.max is None) == (self.min is None):
            raise ValueError("give either max or min")
        return self

    @property
    def bound(self) -> float:
        return self.max if self.max is not None else self.min  # type: ignore[return-value]

    def verdict(self, interval: Interval | None) -> Verdict:
        """pass where the whole interval keeps the bound, fail where none of it does, else inconclusive."""
        if interval is None:
            return "inconclusive"
        low, high = interval if self.max is not None else (-interval[1], -interval[0])
        bound = self.bound if self.max is not None else -self.bound
        if high <= bound:
            return "pass"
        return "fail" if low > bound else "inconclusive"


class Gates(_Strict):
    """A gate file.

    Attributes:
        version: of this form, 1.
        confidence: of the two-sided interval that decides; 0.95 lets 2.5% of models on the bound pass.
    """

    version: Literal[1]
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    gates: list[Gate] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct_names(self) -> "Gates":
        names = [gate.name for gate in self.gates]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"there are two gates named {twice!r}; give each its own name")
        return self

    @property
    def need_reference(self) -> bool:
        return any(gate.metric != NEEDS_NO_REFERENCE for gate in self.gates)

    def judge(self, values: Mapping[str, float], intervals: Mapping[str, Interval | None]) -> list[dict[str, Any]]:
        """The verdict on each gate, as the report holds it; values and intervals go by the metrics' names."""
        return [
            {
                "name": gate.name,
                "metric": gate.metric,
                "verdict": gate.verdict(intervals[gate.metric]),
                "value": values[gate.metric],
                "bound": gate.bound,
                "side": "max" if gate.max is not None else "min",
                "interval": intervals[gate.metric],
            }
            for gate in self.gates
        ]


def read_gates(path: str | Path) -> Gates:
    """The gates of a YAML file. Raises InputError that names the entry and the nearest known word."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"the gates {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    return make_gates(content, str(path))


def make_gates(content: Any, where: str) -> Gates:
    """Gates from the content of a gate file. Raises InputError as `read_gates` does; `where` begins the line."""
    try:
        return Gates.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{where}: {_explain(error)}") from None


def _explain(error: ValidationError) -> str:
    """What is wrong, in one line: an unknown key before all else, because it is often why another seems missing."""
    found = error.errors(include_url=False)
    first = next((wrong for wrong in found if wrong["type"] == "extra_forbidden"), found[0])
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = list(Gate.model_fields if len(first["loc"]) > 1 else Gates.model_fields)
        return f"unknown key {place}{_nearest(str(first['loc'][-1]), known)}"
    if first["type"] == "literal_error" and place.endswith("metric"):
        known = list(Metric.__args__)  # type: ignore[attr-defined]
        return f"unknown {place} {first['input']!r}{_nearest(str(first['input']), known)}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


def _nearest(word: str, known: list[str]) -> str:
    close = get_close_matches(word, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"; {hint}known: {', '.join(known)}"


def exit_status(verdicts: list[dict[str, Any]]) -> int:
    """Of the command line: 1 where a gate failed, else 4 where one is inconclusive, else 0."""
    found = {verdict["verdict"] for verdict in verdicts}
    return 1 if "fail" in found else 4 if "inconclusive" in found else 0
