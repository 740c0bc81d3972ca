"""llmopt: make language-model inference cheap, and prove that nothing was broken."""

import os
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "LLM": "llmopt.engine.llm",
    "SamplingParams": "llmopt.engine.params",
    "quantize": "llmopt.quant.pipeline",
}

__all__ = ["LLM", "SamplingParams", "__version__", "evaluate", "quantize"]


def quiet_barriers() -> None:
    """Let OpenMP's threads sleep at barriers unless the environment says otherwise; must be called before torch loads.

    They spin by default. Beside other busy processes the partner they wait for is often not scheduled, and work then
    takes ten times as long; sleeping costs microseconds. A library must not decide this for its host's process, so
    only llmopt's own processes call it.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used, so that `llmopt --help` does not wait for torch."""
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    if name == "evaluate":
        return import_module("llmopt.evaluate")
    raise AttributeError(f"module 'llmopt' has no attribute {name!r}")
