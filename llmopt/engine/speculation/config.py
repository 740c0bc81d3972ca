"""What `--speculative-config` says."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from llmopt.errors import InputError

MethodName = Literal["ngram", "draft_model"]
MOST_TOKENS = 32
_OF_NGRAM = ("prompt_lookup_max", "prompt_lookup_min")
_NUMBERS = ("num_speculative_tokens", *_OF_NGRAM)


@dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """How tokens are drafted; the names are vLLM's.

    Attributes:
        method: ngram looks the latest tokens up in the request's own text and drafts what followed them there;
            draft_model asks a smaller model. Left out, it is draft_model where a model is given.
        model: the draft: a folder, a .gguf file, a hub id or a built-in name, with the vocabulary of the target.
        num_speculative_tokens: the most tokens that are drafted for a request in a step; fewer where that is faster.
            By default 8 for ngram and 4 for draft_model.
        prompt_lookup_max, prompt_lookup_min: how many of the latest tokens must be found again: as many as can be, from
            the one to the other. By default 5 and 3; where one is given the other is the same.

    Raises InputError for what contradicts this.
    """

    method: MethodName | None = None
    model: str | None = None
    num_speculative_tokens: int | None = None
    prompt_lookup_max: int | None = None
    prompt_lookup_min: int | None = None

    def __post_init__(self) -> None:
        if self.method is None and self.model is not None:
            self._set("method", "draft_model")
        if self.method not in get_args(MethodName):
            raise InputError(f"the method of speculation must be {_known(get_args(MethodName))}, not {self.method!r}")
        for name in _NUMBERS:
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 1 <= value <= MOST_TOKENS):
                raise InputError(f"{name} must be a whole number from 1 to {MOST_TOKENS}, not {value!r:.40}")
        if self.method == "ngram":
            self._settle_ngram()
        else:
            self._settle_draft_model()

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "SpeculativeConfig":
        """From vLLM's keys. Raises InputError for an unknown one."""
        known = [field.name for field in fields(cls)]
        for key in settings:
            if key not in known:
                raise InputError(f"speculative_config has no {key!r}; known: {_known(known)}")
        return cls(**settings)

    @classmethod
    def parse(cls, text: str | None) -> "SpeculativeConfig | None":
        """From the JSON object of the command line; None for none. Raises InputError where it is none."""
        if text is None:
            return None
        try:
            settings = json.loads(text)
        except ValueError as error:
            raise InputError(f"--speculative-config is not JSON: {error}") from None
        if not isinstance(settings, dict):
            raise InputError(
                f'--speculative-config must be a JSON object such as {{"method": "ngram"}}, not {text:.40}'
            )
        return cls.of(settings)

    @property
    def most(self) -> int:
        """The most tokens that are drafted for a request in a step."""
        return self.num_speculative_tokens or 1

    @property
    def lookup(self) -> tuple[int, int]:
        """How many of the latest tokens ngram looks up: the least and the most."""
        return self.prompt_lookup_min or 1, self.prompt_lookup_max or 1

    def _settle_ngram(self) -> None:
        if self.model is not None:
            raise InputError("ngram drafts without a model; leave model out, or give the method draft_model")
        longest, shortest = self.prompt_lookup_max, self.prompt_lookup_min
        if longest is None and shortest is None:
            longest, shortest = 5, 3
        longest, shortest = longest or shortest or 1, shortest or longest or 1
        if shortest > longest:
            raise InputError(f"prompt_lookup_min ({shortest}) must not exceed prompt_lookup_max ({longest})")
        self._set("prompt_lookup_max", longest)
        self._set("prompt_lookup_min", shortest)
        self._set("num_speculative_tokens", self.num_speculative_tokens or 8)

    def _settle_draft_model(self) -> None:
        if not isinstance(self.model, str):
            raise InputError('draft_model needs the draft: {"method": "draft_model", "model": MODEL}')
        for name in _OF_NGRAM:
            if getattr(self, name) is not None:
                raise InputError(f"{name} is of the method ngram, not of draft_model; leave it out")
        self._set("num_speculative_tokens", self.num_speculative_tokens or 4)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def _known(names: Any) -> str:
    return ", ".join(names)
