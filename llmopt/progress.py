"""How long work tells its caller where it stands, without knowing how that is shown."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called as progress(phase, done, total): phase in words for the user, which may change while it goes on; done and
total in steps of that phase, from 0."""


def silent(phase: str, done: int, total: int) -> None:
    """Shows nothing."""
