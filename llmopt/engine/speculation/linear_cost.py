"""What a pass through a model costs by the number of its rows, learnt from the passes that there were."""

_MEMORY = 0.98
"""How much each pass still counts after the next one."""
_OUTLIER = 3.0
"""A pass that took more than this many times what its rows may cost counts as that: the machine was busy elsewhere."""


class LinearCost:
    """Seconds of a pass = base + slope · rows, by least squares over the passes, of which the latest count most.

    A line is enough for choosing among the few numbers of rows near the latest ones. Where all passes had the same
    number of rows nothing is known of the slope, and more rows count as free: so they are tried, and then it is known.
    """

    def __init__(self) -> None:
        self._weight = self._rows = self._seconds = self._variance = self._covariance = 0.0

    @property
    def known(self) -> bool:
        return self._weight > 0

    @property
    def slope(self) -> float:
        """Seconds that one more row takes."""
        return max(0.0, self._covariance / self._variance) if self._variance > 0 else 0.0

    def __call__(self, rows: int) -> float:
        return max(0.0, self._seconds + self.slope * (rows - self._rows))

    def observe(self, rows: int, seconds: float) -> None:
        """Take in a pass (West 1979's update of means and moments, doi:10.1145/359146.359153, with forgetting)."""
        if self.known:
            in_proportion = self._seconds * max(1.0, rows / self._rows)
            seconds = min(seconds, _OUTLIER * max(self(rows), in_proportion))
        self._weight = _MEMORY * self._weight + 1
        share = 1 / self._weight
        off_rows, off_seconds = rows - self._rows, seconds - self._seconds
        self._rows += share * off_rows
        self._seconds += share * off_seconds
        self._variance = (1 - share) * (self._variance + share * off_rows * off_rows)
        self._covariance = (1 - share) * (self._covariance + share * off_rows * off_seconds)
