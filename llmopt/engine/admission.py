"""Who of those that wait may be let in: the policies of `--batching`, in front of one and the same scheduler loop.

The scheduler asks before it lets anybody in, and tells who comes and who has gone; what it then does with those that
may enter is the same under every policy. Nobody waits for ever: a batch ends, because each of its requests does, and a
window ends by the clock.
"""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from llmopt.engine.request import Request


class Admission(Protocol):
    """A policy."""

    def add(self, request: Request) -> None:
        """Note that a request has come."""

    def remove(self, request: Request) -> None:
        """Note that a request has ended or was aborted."""

    def select(self, waiting: Sequence[Request]) -> Sequence[Request]:
        """Those of `waiting` that may enter in this step, in its order."""

    def pause(self, waiting: Sequence[Request]) -> float:
        """Seconds for which `select` is going to name nobody, where nobody runs and nothing else happens."""


class Continuous:
    """Whoever waits may enter at every step (Yu et al. 2022, "Orca", OSDI 22)."""

    def add(self, request: Request) -> None:
        pass

    def remove(self, request: Request) -> None:
        pass

    def select(self, waiting: Sequence[Request]) -> Sequence[Request]:
        return waiting

    def pause(self, waiting: Sequence[Request]) -> float:
        return 0.0


class Static:
    """Who waits when a batch has ended, at most `limit` of them, makes the next, and nobody else enters meanwhile.

    A request stays a member until it has ended, even where it waits for room or was preempted. Unlike a batch of padded
    tensors, members that have ended cost nothing while the rest goes on.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._batch: set[str] = set()

    def add(self, request: Request) -> None:
        pass

    def remove(self, request: Request) -> None:
        self._batch.discard(request.id)

    def select(self, waiting: Sequence[Request]) -> Sequence[Request]:
        if not self._batch and self.pause(waiting) == 0:
            self._batch = {request.id for request in waiting[: self.limit]}
        return [request for request in waiting if request.id in self._batch]

    def pause(self, waiting: Sequence[Request]) -> float:
        return 0.0


class Dynamic(Static):
    """As `Static`, but a batch begins only once it is full, or once one that waits has waited for `window` seconds.

    These are max_batch_size and max_queue_delay of Triton's dynamic batcher. As there, waiting for the batch before
    counts: what has waited through all of it waits for no window.
    """

    def __init__(self, limit: int, window: float, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(limit)
        self.window = window
        self.clock = clock
        self._came: dict[str, float] = {}  # when each request came that has not ended

    def add(self, request: Request) -> None:
        self._came[request.id] = self.clock()

    def remove(self, request: Request) -> None:
        super().remove(request)
        del self._came[request.id]

    def pause(self, waiting: Sequence[Request]) -> float:
        if self._batch or not waiting or len(waiting) >= self.limit:
            return 0.0
        oldest = min(self._came[request.id] for request in waiting)
        return max(0.0, oldest + self.window - self.clock())


def admission_of(batching: str, limit: int, window: float) -> Admission:
    """The policy of this name; `limit` is the requests of a batch, `window` is in seconds."""
    if batching == "static":
        return Static(limit)
    return Dynamic(limit, window) if batching == "dynamic" else Continuous()
