"""The text that quality is measured on, cut into windows of tokens."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmopt.errors import InputError
from llmopt.model import builtin_text
from llmopt.model.tokenizer import Tokenizer


@dataclass(frozen=True)
class Text:
    """A text and the name that reports give it."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


def read_text(path: str | Path | None) -> Text:
    """The text of a UTF-8 file, or the built-in one for None. Raises InputError where it cannot be read."""
    if path is None:
        return Text(builtin_text.NAME, builtin_text.builtin_text())
    try:
        return Text(str(path), Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"the text {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"the text {path} is not UTF-8") from None


@dataclass(frozen=True)
class Windows:
    """Consecutive pieces of a text that do not overlap.

    Attributes:
        tokens: [windows][ctx] token ids.
        bos: whether each window begins with the tokenizer's opening token, which is so where the tokenizer puts one
            before a text by itself. It is one of the ctx tokens and is never predicted.
    """

    text: Text
    ctx: int
    tokens: list[list[int]]
    bos: bool

    def describe(self) -> dict[str, Any]:
        """What the report says about the text."""
        return {
            "source": self.text.name,
            "sha256": self.text.sha256,
            "ctx": self.ctx,
            "windows": len(self.tokens),
            "predicted_tokens": len(self.tokens) * (self.ctx - 1),
            "bos": self.bos,
        }


def cut_windows(tokenizer: Tokenizer, text: Text, ctx: int, count: int) -> Windows:
    """The first `count` windows of exactly `ctx` tokens; the text is tokenized once, as a whole.

    Raises InputError where there are fewer, saying how many there are.
    """
    if ctx < 2:
        raise InputError(f"ctx must be at least 2, not {ctx}: one token to see and one to predict")
    if count < 1:
        raise InputError(f"windows must be at least 1, not {count}")
    bos = tokenizer.bos_id is not None and tokenizer.encode("")[:1] == [tokenizer.bos_id]
    opening = [tokenizer.bos_id] if bos and tokenizer.bos_id is not None else []
    tokens = tokenizer.encode(text.content, add_special_tokens=False)
    step = ctx - len(opening)
    available = len(tokens) // step
    if available < count:
        raise InputError(
            f"{text.name} has {len(tokens)} tokens, enough for {available} windows of {ctx}, not for {count}; "
            "give fewer or shorter windows, or a longer text"
        )
    return Windows(text, ctx, [opening + tokens[i * step : (i + 1) * step] for i in range(count)], bos)
