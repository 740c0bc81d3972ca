"""How one request wants its tokens chosen."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

from llmopt.errors import InputError

MAX_LOGPROBS = 20
LEAST_TEMPERATURE = 1e-5  # as in vLLM
LARGEST_BIAS = 100.0  # as in OpenAI's API


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The sampling parameters of a request, with vLLM's names and meanings.

    What they do to logits comes in vLLM's order: the bias; penalties (repetition: Keskar et al. 2019,
    arXiv:1909.05858; presence and frequency as in OpenAI's API); tokens that are forbidden or not allowed; temperature;
    then top-k, min-p (Nguyen et al. 2024, arXiv:2407.01082) and top-p (Holtzman et al. 2019, arXiv:1904.09751). A
    temperature of 0 is greedy, and so is one so near to it that dividing by it overflows.

    Attributes:
        n: completions for each prompt.
        max_tokens: tokens to generate at most; None up to what the model's length leaves.
        seed: makes this request's choices repeatable, whatever else runs beside it; None or -1 draws a fresh one.
        stop: strings that end the text; they are not part of it unless `include_stop_str_in_output`.
        stop_token_ids: tokens that end the text besides the model's own end tokens.
        ignore_eos: go on after the model's end tokens.
        min_tokens: tokens before which no end token may be chosen and no stop string counts.
        logprobs: how many of the likeliest tokens to report at each step beside the chosen one; None for no report.
        prompt_logprobs: the same for each token of the prompt but the first, before which there is nothing.
        logit_bias: what is added to the logits of tokens, -100 to 100, by token id.
        allowed_token_ids: the only tokens that may be chosen; None for all.
        bad_words: texts that must not come about in the output. A word is looked for as the tokens that it makes at the
            beginning of a text and after a space; the last of them is forbidden where the others have just come.
        skip_special_tokens: leave special tokens out of the text.

    Raises InputError for a value outside its range, naming the range.
    """

    n: int = 1
    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        self._set("stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()))
        self._set("bad_words", (self.bad_words,) if isinstance(self.bad_words, str) else tuple(self.bad_words or ()))
        self._set("stop_token_ids", tuple(self.stop_token_ids or ()))
        if self.allowed_token_ids is not None:
            self._set("allowed_token_ids", tuple(self.allowed_token_ids))
        if self.logit_bias is not None:
            self._set("logit_bias", _bias_by_token(self.logit_bias))
        if self.top_k == -1:  # vLLM's other spelling of "all"
            self._set("top_k", 0)
        if self.seed == -1:
            self._set("seed", None)
        self._check_numbers()
        self._check_texts()
        self._check_tokens()

    @property
    def greedy(self) -> bool:
        return self.temperature < LEAST_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    @property
    def named_tokens(self) -> dict[str, Collection[int]]:
        """The tokens that are named by their id, for each parameter that names some: they must be in the vocabulary."""
        named = {
            "stop_token_ids": self.stop_token_ids,
            "logit_bias": self.logit_bias or (),
            "allowed_token_ids": self.allowed_token_ids or (),
        }
        return {name: tokens for name, tokens in named.items() if tokens}

    def of_choice(self, index: int) -> "SamplingParams":
        """Those of one of the n completions, with a seed of its own."""
        seed = self.seed
        if seed is not None:
            seed = seed + index if seed >= 0 else seed - index  # away from -1, which is none
        return replace(self, n=1, seed=seed)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_numbers(self) -> None:
        for kind, what, ranges in ((Integral, "a whole number", _WHOLE), (Real, "a number", _REAL)):
            for name, low, high in ranges:
                value = getattr(self, name)
                if value is None and name in _MAY_BE_NONE:
                    continue
                is_kind = isinstance(value, kind)
                if not is_kind:
                    raise InputError(f"{name} must be {what}, not {value!r:.40}")
                if not low <= value <= high:  # also refuses NaN
                    raise InputError(f"{name} must be between {low} and {high}, not {value}")
        if self.top_p == 0.0:
            raise InputError("top_p must be above 0; for greedy decoding give temperature 0")
        if self.repetition_penalty == 0.0:
            raise InputError("repetition_penalty must be above 0; 1 means none")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InputError(f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})")

    def _check_texts(self) -> None:
        for name, texts in (("stop", self.stop), ("bad_words", self.bad_words)):
            for text in texts:
                if not isinstance(text, str):
                    raise InputError(f"{name} must hold strings, not {text!r:.40}")
                try:
                    text.encode()
                except UnicodeEncodeError:
                    raise InputError(f"{name} holds half of a surrogate pair, which is no character") from None
        if "" in self.stop:
            raise InputError("a stop string must not be empty")
        if not all(word.strip() for word in self.bad_words):
            raise InputError("a bad word must hold more than spaces")

    def _check_tokens(self) -> None:
        for name, tokens in self.named_tokens.items():
            for token in tokens:
                if not isinstance(token, Integral):
                    raise InputError(f"{name} must hold token ids, not {token!r:.40}")
        if self.allowed_token_ids == ():
            raise InputError("allowed_token_ids must hold at least one token; leave it out to allow all")


def _bias_by_token(logit_bias: Mapping[Any, Any]) -> dict[int, float]:
    """A bias with numbers for keys; OpenAI's API has them as strings."""
    biases = {}
    for key, value in logit_bias.items():
        try:
            token = int(key)
        except (TypeError, ValueError):
            raise InputError(f'the keys of logit_bias must be token ids, such as "50", not {key!r:.40}') from None
        is_number = isinstance(value, Real)
        if not is_number or not -LARGEST_BIAS <= value <= LARGEST_BIAS:
            raise InputError(f"logit_bias must be between -100 and 100, not {value!r:.40} (token {token})")
        biases[token] = float(value)
    return biases


_WHOLE = (
    ("n", 1, 128),
    ("max_tokens", 1, 2**31),
    ("top_k", 0, 2**31),
    ("seed", -(2**63), 2**64 - 1),
    ("min_tokens", 0, 2**31),
    ("logprobs", 0, MAX_LOGPROBS),
    ("prompt_logprobs", 0, MAX_LOGPROBS),
)
_REAL = (
    ("temperature", 0, 2),
    ("top_p", 0, 1),
    ("min_p", 0, 1),
    ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2),
    ("repetition_penalty", 0, 100),
)
_MAY_BE_NONE = frozenset({"max_tokens", "seed", "logprobs", "prompt_logprobs"})

PARAMETER_NAMES = frozenset(field.name for field in fields(SamplingParams))
