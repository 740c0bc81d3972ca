"""Lets engines take turns, so that what disturbs the machine for a while disturbs them all."""

import sys
import time
from collections.abc import Mapping, Sequence
from statistics import mean

import psutil
from bench_engines import Engine
from bench_rows import Case, Speed

from llmopt.errors import LlmoptError

Measurement = tuple[str, Case, str]
"""Model, case, engine."""

WITNESS_SECONDS = 0.3


def name_of(measurement: Measurement) -> str:
    model, case, engine = measurement
    return f"{model}/{case.name}/{engine}"


def time_left(taken: Mapping[Measurement, Sequence[float]], to_come: Sequence[Measurement]) -> float:
    """Seconds that measurements will take: as long as each took before, or as the others took on average."""
    usual = mean(mean(seconds) for seconds in taken.values()) if taken else 0.0
    return sum(mean(taken[each]) if each in taken else usual for each in to_come)


class Turns:
    """Measures everything once a round, in the order given.

    Attributes:
        speeds: what each round showed.
        failures: what went wrong; a measurement that failed is not tried again.
        busy_elsewhere: percent of the processor that other processes used just before each measurement.
    """

    def __init__(self, engines: Mapping[tuple[str, str], Engine], wanted: Sequence[Measurement], rounds: int) -> None:
        self.engines = engines
        self.wanted = wanted
        self.rounds_left = rounds
        self.speeds: dict[Measurement, list[Speed]] = {each: [] for each in wanted}
        self.failures: dict[Measurement, str] = {}
        self.busy_elsewhere: list[float] = []
        self._seconds: dict[Measurement, list[float]] = {}

    def take_round(self) -> None:
        self.rounds_left -= 1
        able = [each for each in self.wanted if each not in self.failures]
        for index, measurement in enumerate(able, 1):
            said = self._take(measurement)
            left = time_left(self._seconds, able[index:] + able * self.rounds_left) / 60
            print(f"{name_of(measurement)}: {said}; about {left:.1f} min left", file=sys.stderr, flush=True)

    def _take(self, measurement: Measurement) -> str:
        """Measure one; what to say of it."""
        model, case, engine = measurement
        self.busy_elsewhere.append(psutil.cpu_percent(WITNESS_SECONDS))
        start = time.perf_counter()
        try:
            speed = self.engines[model, engine].measure(case)
        except LlmoptError as error:
            self.failures[measurement] = str(error)
            return str(error)
        self.speeds[measurement].append(speed)
        self._seconds.setdefault(measurement, []).append(time.perf_counter() - start)
        failed = f"{speed.failures} of {speed.requests} requests failed, " if speed.failures else ""
        return (
            f"{speed.tokens_per_s:,.1f} tokens/s, {failed}others used {self.busy_elsewhere[-1]:.0f}% of the processor"
        )
