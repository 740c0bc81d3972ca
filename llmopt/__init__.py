"""llmopt: make language-model inference cheap, and prove that nothing was broken."""

from importlib import import_module

__version__ = "0.1.0"

_EXPORTS = {
    "LLM": "llmopt.engine.llm",
    "SamplingParams": "llmopt.engine.params",
    "quantize": "llmopt.quant.pipeline",
    "evaluate": "llmopt.evaluate.evaluate",
}

__all__ = ["LLM", "SamplingParams", "__version__", "evaluate", "quantize"]


def __getattr__(name: str):
    """Import the public names when they are first used, so that `llmopt --help` does not wait for torch."""
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'llmopt' has no attribute {name!r}")
