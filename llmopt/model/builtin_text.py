"""English prose that every CPython carries, for those who give no text of their own: the Python language reference,
as `pydoc_data.topics` holds it. One half calibrates and the other measures, so that no model is measured on text it was
calibrated on. The topics differ a little between Python versions; measure with one version, or give a text."""

from pydoc_data.topics import topics

NAME = "pydoc_data.topics"


def calibration_text() -> str:
    """The first half of the topics in alphabetical order; about 200,000 characters."""
    return "\n\n".join(_halves()[0])


def builtin_text() -> str:
    """The second half of the topics, for evaluation, less the paragraphs that the first half has too; about 200,000
    characters."""
    calibrated, measured = _halves()
    known = set(calibrated)
    return "\n\n".join(paragraph for paragraph in measured if paragraph not in known)


def _halves() -> tuple[list[str], list[str]]:
    """The paragraphs of both halves. Topics quote each other, so that some paragraphs are in several."""
    names = sorted(topics)
    middle = len(names) // 2
    return _paragraphs(names[:middle]), _paragraphs(names[middle:])


def _paragraphs(names: list[str]) -> list[str]:
    return "\n\n".join(topics[name] for name in names).split("\n\n")
