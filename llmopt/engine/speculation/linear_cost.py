"""What a pass through a model costs by the number of its rows, learnt from the passes that there were."""

_SHARE = 0.05
"""What a pass counts in the means of rows and of seconds, which follow contexts as they grow."""
_MEMORY = 0.995
"""How much it still counts after the next one in the slope, which is of the machine, and which is best seen in the few
passes of very different numbers of rows."""
_OUTLIER = 3.0
"""A pass that took more than this many times what its rows may cost counts as that: the machine was busy elsewhere."""


class LinearCost:
    """Seconds of a pass = base + slope · rows: means that forget soon, and about them a slope by least squares that
    forgets slowly.

    A line is enough for choosing among the numbers of rows near the latest ones. Where all passes had the same number
    nothing is known of the slope, and more rows count as free: so they are tried, and then it is known.
    """

    def __init__(self) -> None:
        self._passes = -1  # the first does not count: it finds its weights in no cache
        self._rows = self._seconds = self._variance = self._covariance = 0.0

    @property
    def known(self) -> bool:
        return self._passes > 0

    @property
    def slope(self) -> float:
        """Seconds that one more row takes."""
        return max(0.0, self._covariance / self._variance) if self._variance > 0 else 0.0

    def __call__(self, rows: int) -> float:
        return max(0.0, self._seconds + self.slope * (rows - self._rows))

    def observe(self, rows: int, seconds: float) -> None:
        """Take in a pass."""
        if self.known:
            in_proportion = self._seconds * max(1.0, rows / self._rows)
            seconds = min(seconds, _OUTLIER * max(self(rows), in_proportion))
            off_rows, off_seconds = rows - self._rows, seconds - self._seconds
            self._variance = _MEMORY * self._variance + off_rows * off_rows
            self._covariance = _MEMORY * self._covariance + off_rows * off_seconds
        self._passes += 1
        if not self.known:
            return
        share = max(_SHARE, 1 / self._passes)
        self._rows += share * (rows - self._rows)
        self._seconds += share * (seconds - self._seconds)
