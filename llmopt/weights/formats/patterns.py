"""Modules named in a checkpoint's settings: by full name, or by a regular expression, which may be hostile."""

import re
from collections.abc import Iterable
from functools import cache

from llmopt.errors import InputError

PREFIX = "re:"  # compressed-tensors' mark of a regular expression
_LONGEST = 500
_MOST_CHOICES = 5
# What stands for itself is taken out first: escapes, sets, and the question mark that opens a special group.
_LITERAL = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]")
_SPECIAL_GROUP = re.compile(r"\(\?")
_COMMENT = re.compile(r"\(\?(?:#|[a-zA-Z-]*x)")  # could hide choices from the count; nobody names modules so
_REPEAT = re.compile(r"(\)?)(?:[*+?]|\{[^}]*\})[?+]?")


@cache
def compiled(pattern: str) -> re.Pattern[str]:
    """A pattern that takes a bounded time on the name of a module.

    Raises InputError for one that is no regular expression, and for one that could take very long, as Python's
    matcher tries every combination of choices: how often each repeat repeats, which alternative each group takes. So
    patterns are short, make few choices, and repeat no group.
    """
    if len(pattern) > _LONGEST:
        raise InputError(f"a pattern of module names is {len(pattern)} characters long; at most {_LONGEST} are read")
    structure = _SPECIAL_GROUP.sub("(", _LITERAL.sub("_", pattern))
    repeats = list(_REPEAT.finditer(structure))
    choices = len(repeats) + (structure.count("(") if "|" in structure else 0)
    of_a_group = any(repeat[1] and not repeat[0].startswith(")?") for repeat in repeats)
    if choices > _MOST_CHOICES or of_a_group or _COMMENT.search(pattern):
        raise InputError(f"the pattern {pattern!r} of module names could take very long to match: up to "
                         f"{_MOST_CHOICES} repeats and groups are read, no repeated group, no comment")  # fmt: skip
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"the pattern {pattern!r} of module names is no regular expression: {error}") from None


def check_names(names: Iterable[str]) -> None:
    """Raise InputError where one is a pattern that cannot be used."""
    for name in names:
        if name.startswith(PREFIX):
            compiled(name.removeprefix(PREFIX))


def is_named(module: str, names: Iterable[str]) -> bool:
    """Whether names or patterns, each after `re:` and matched from the beginning, include a module."""
    return any(
        compiled(name.removeprefix(PREFIX)).match(module) is not None if name.startswith(PREFIX) else name == module
        for name in names
    )
