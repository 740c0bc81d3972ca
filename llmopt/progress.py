"""How long work tells its caller where it stands, without knowing how that is shown."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called as progress(phase, done, total): phase in words for the user, done and total in steps of that phase."""


def silent(phase: str, done: int, total: int) -> None:
    """Shows nothing."""
