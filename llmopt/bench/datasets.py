"""What is sent: random prompts of an exact length, or the user's own from a JSONL file."""

import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmopt.errors import InputError

DATASET_NAMES = ("random", "custom")

# Common words, which most vocabularies hold as one token each.
_WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state",
          "family", "group", "country", "problem", "hand", "part", "place", "case", "week", "company", "system", "work",
          "program", "question", "government", "number", "night", "point", "home", "water", "room", "mother", "area",
          "money", "story", "fact", "month", "lot", "right", "study", "book", "eye", "job", "word")  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """One request's prompt, as text or as token ids, and the number of tokens to ask for."""

    content: str | list[int]
    max_tokens: int


def random_tokens(
    count: int, length: int, vocab_size: int, excluded: Collection[int], rng: np.random.Generator
) -> list[list[int]]:
    """`count` prompts of exactly `length` token ids, drawn evenly from the vocabulary less `excluded` (its special
    tokens, which make some models stop or change their behaviour)."""
    allowed = np.setdiff1d(np.arange(vocab_size), np.fromiter(excluded, dtype=np.int64))
    if not allowed.size:
        raise InputError(f"all {vocab_size} tokens of the vocabulary are special; there is nothing to draw from")
    return allowed[rng.integers(0, allowed.size, size=(count, length))].tolist()


def random_prompts(
    count: int,
    input_len: int,
    output_len: int,
    seed: int,
    tokenizer: str | None,
    range_ratio: float = 0.0,
    prefix_len: int = 0,
) -> list[Prompt]:
    """Random prompts. With the tokenizer's MODEL they are token ids, so that the server gets exactly `input_len`
    tokens; without it they are `input_len` common English words, and only the server knows how many tokens these are.

    With a range ratio of r, lengths of prompts and of outputs are drawn evenly from (1 - r) to (1 + r) times the one
    given; before each prompt come the same `prefix_len` tokens or words (vLLM's parameters).
    """
    rng = np.random.default_rng(seed)
    longest = max(_lengths(input_len, range_ratio))
    if tokenizer is None:
        words = [rng.choice(_WORDS, size=longest).tolist() for _ in range(count)]
        prefix: list = rng.choice(_WORDS, size=prefix_len).tolist()
        drawn: list[list] = [prefix + cut for cut in _cut(words, input_len, range_ratio, rng)]
    else:
        from llmopt.model.tokenizer import load_tokenizer

        loaded = load_tokenizer(tokenizer)
        tokens = random_tokens(count, longest, loaded.vocab_size, loaded.special_ids, rng)
        (prefix,) = random_tokens(1, prefix_len, loaded.vocab_size, loaded.special_ids, rng)
        drawn = [prefix + cut for cut in _cut(tokens, input_len, range_ratio, rng)]
    outputs = rng.choice(_lengths(output_len, range_ratio), size=count).tolist()
    contents: list[Any] = [" ".join(words) for words in drawn] if tokenizer is None else drawn
    return [Prompt(content, length) for content, length in zip(contents, outputs, strict=True)]


def _lengths(length: int, range_ratio: float) -> range:
    """The lengths that are drawn from."""
    return range(max(1, math.ceil(length * (1 - range_ratio))), math.floor(length * (1 + range_ratio)) + 1)


def _cut(drawn: list[list], length: int, range_ratio: float, rng: np.random.Generator) -> list[list]:
    """Each cut to a length of its own."""
    lengths = rng.choice(_lengths(length, range_ratio), size=len(drawn)).tolist()
    return [one[:end] for one, end in zip(drawn, lengths, strict=True)]


def custom_prompts(count: int, path: Path, output_len: int) -> list[Prompt]:
    """The first `count` prompts of a JSONL file: an object a line with "prompt" and, if it differs from `output_len`,
    "max_tokens".

    Raises InputError where a line has another form, and where there are fewer: sending a prompt twice would measure
    the server's prefix cache.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--dataset-path {path} cannot be read: {error}") from None
    if len(lines) < count:
        raise InputError(f"{path} holds {len(lines)} prompts; give --num-prompts of at most that, not {count}")
    return [
        _custom_prompt(line, f"{path}, prompt {number}", output_len) for number, line in enumerate(lines[:count], 1)
    ]


def _custom_prompt(line: str, where: str, output_len: int) -> Prompt:
    try:
        entry: Any = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON: {error}") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not entry["prompt"]:
        raise InputError(f'{where}: needs an object with a text under "prompt"')
    max_tokens = entry.get("max_tokens", output_len)
    if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1:
        raise InputError(f'{where}: "max_tokens" must be a whole number of at least 1')
    return Prompt(entry["prompt"], max_tokens)
