"""Where the time of a quantization goes."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Phases:
    """Adds up the seconds spent in each phase; phases do not nest."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] += time.monotonic() - started

    def seconds(self) -> dict[str, float]:
        """Phase → seconds, in the order in which phases began."""
        return {name: round(seconds, 3) for name, seconds in self._seconds.items()}
