"""Renders a model's chat template in Jinja's sandbox: the template is data from a download, never trusted code."""

import json
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.sandbox

from llmopt.errors import InputError

LONGEST_RESULT = 16 * 1024 * 1024  # characters; a template must not fill the memory


def render(template: str, **variables: Any) -> str:
    """The text that a chat template makes of its variables. Raises InputError with the template's own complaint."""
    try:
        pieces, length = [], 0
        for piece in _compiled(template).generate(**variables):
            length += len(piece)
            if length > LONGEST_RESULT:
                raise InputError(f"the chat template gives more than {LONGEST_RESULT} characters")
            pieces.append(piece)
        return "".join(pieces)
    except jinja2.TemplateError as error:
        raise InputError(f"the chat template does not accept these messages: {error}") from None
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"the chat template failed on these messages: {error}") from None


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    # Jinja's own filter escapes <, > and &, which would show up in prompts.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
