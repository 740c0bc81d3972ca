"""English prose that every CPython carries, for those who give no text of their own: the Python language reference,
as `pydoc_data.topics` holds it. One half calibrates and the other measures, so that no model is measured on text it was
calibrated on. The topics differ a little between Python versions; measure with one version, or give a text."""

from pydoc_data.topics import topics

NAME = "pydoc_data.topics"


def calibration_text() -> str:
    """The first half of the topics in alphabetical order; about 200,000 characters."""
    names = sorted(topics)
    return _join(names[: len(names) // 2])


def builtin_text() -> str:
    """The second half of the topics, for evaluation; about 250,000 characters."""
    names = sorted(topics)
    return _join(names[len(names) // 2 :])


def _join(names: list[str]) -> str:
    return "\n\n".join(topics[name] for name in names)
