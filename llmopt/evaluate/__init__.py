"""Quality: perplexity, divergence, gates. The package itself can be called, as `llmopt.evaluate(model, ...)`."""

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    """Python binds a package's name to the package, which would hide a function of the same name."""

    def __call__(self, *args: Any, **options: Any) -> dict[str, Any]:
        from llmopt.evaluate.evaluate import evaluate

        return evaluate(*args, **options)


sys.modules[__name__].__class__ = _CallablePackage
