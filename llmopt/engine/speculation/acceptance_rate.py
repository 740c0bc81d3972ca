"""How often drafted tokens are right."""


class AcceptanceRate:
    """How likely a drafted token is accepted whose predecessors were; the latest count most."""

    def __init__(self, memory: float, guess: float) -> None:
        self._memory = memory
        self._tried = 6.0  # so much a first guess counts
        self._accepted = self._tried * guess

    @property
    def value(self) -> float:
        return self._accepted / self._tried

    def observe(self, drafted: int, accepted: int) -> None:
        """Take in that so many tokens were drafted after each other and so many accepted. What comes after one that was
        rejected tells nothing."""
        for place in range(min(drafted, accepted + 1)):
            self._tried = self._memory * self._tried + 1
            self._accepted = self._memory * self._accepted + (place < accepted)
