"""Renders a model's chat template in Jinja's sandbox: the template is data from a download, never trusted code."""

import json
from collections.abc import Sized
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

from llmopt.errors import InputError

LONGEST_RESULT = 16 * 1024 * 1024  # characters; a template must not fill the memory
LARGEST_NUMBER = 4096  # bits


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
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError, MemoryError, RecursionError) as error:
        raise InputError(f"the chat template failed on these messages: {error}") from None


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which a product or a power cannot fill the memory before its length is seen."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            too_large = bits > LARGEST_NUMBER
        else:
            repeated = [(left, right), (right, left)] if operator == "*" else []
            too_large = any(
                isinstance(value, Sized) and isinstance(times, int) and len(value) * times > LONGEST_RESULT
                for value, times in repeated
            )
        if too_large:
            raise jinja2.sandbox.SecurityError(f"the result of {operator} would be too large")
        return super().call_binop(context, operator, left, right)


class _GenerationBlock(jinja2.ext.Extension):
    """Passes on what stands between `{% generation %}` and `{% endgeneration %}`, by which templates mark the text
    that a model is trained on."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
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
