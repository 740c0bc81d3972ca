"""Log lines of the server's two processes. Neither prompts nor keys are ever logged."""

import logging

LEVELS = ("debug", "info", "warning", "error")


def configure_logging(level: str) -> None:
    """Log llmopt's messages of `level` and above to standard error, and only warnings of the libraries."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("llmopt").setLevel(level.upper())
