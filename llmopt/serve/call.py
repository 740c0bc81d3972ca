"""One API request on its way through the engine: prompts and parameters in, an answer or a stream of chunks out."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from llmopt.engine.outputs import Delta, TokenLogprobs
from llmopt.engine.params import PARAMETER_NAMES, SamplingParams
from llmopt.engine.token_rules import TokenRules
from llmopt.errors import InputError
from llmopt.model.tokenizer import Tokenizer
from llmopt.serve.errors import ApiError
from llmopt.serve.protocol import Ready
from llmopt.serve.schema import GenerationRequest

MAX_CHOICES = 4096
"""Completions that one HTTP request may ask for, over all its prompts."""


@dataclass(frozen=True)
class ServedModel:
    """What turning a request into engine work needs to know about the model."""

    tokenizer: Tokenizer
    names: tuple[str, ...]
    ready: Ready


class Call(ABC):
    """One request for completions of one or more prompts.

    Attributes:
        id: the answer's id.
        works: the engine's share: choice by choice, the choices of a prompt next to each other.
    """

    id_prefix: ClassVar[str]
    chunk_object: ClassVar[str]
    answer_object: ClassVar[str]

    def __init__(self, request: GenerationRequest, model: ServedModel, prompts: Sequence[list[int]]) -> None:
        self.id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self.request = request
        self.tokenizer = model.tokenizer
        self.prompts = prompts
        self.choices_per_prompt = 1 if request.n is None else request.n
        self.model_name = request.model or model.names[0]
        self.created = int(time.time())
        self.works = self._works(model.ready)
        self._output_tokens = [0] * len(self.works)
        self._cached_tokens = [0] * len(self.prompts)
        self._started = [False] * len(self.works)

    @abstractmethod
    def max_tokens(self, room: int) -> int | None:
        """Tokens to generate at most where the prompt leaves `room`; None for as many as there is room for."""

    @abstractmethod
    def logprobs(self) -> int | None:
        """How many alternatives each step must report; None for no report."""

    def prompt_logprobs(self) -> int | None:
        """How many alternatives are to be reported of each token of a prompt; None for no report."""
        return self.request.prompt_logprobs

    @abstractmethod
    def choice(self, index: int, whole: Delta) -> dict[str, Any]:
        """A finished choice of an answer that is not streamed."""

    @abstractmethod
    def chunk_choices(self, index: int, delta: Delta, first: bool) -> list[dict[str, Any]]:
        """The choices of the chunks that tell a delta, one chunk each."""

    def answer(self, wholes: Sequence[Delta]) -> dict[str, Any]:
        """The body of an answer that is not streamed, from what the engine said about each choice in all."""
        for index, whole in enumerate(wholes):
            self._count(index, whole)
        choices = [self.choice(index, whole) for index, whole in enumerate(wholes)]
        return {**self._head(self.answer_object), "choices": choices, "usage": self.usage()}

    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """The chunks of a stream that tell a delta; none where there is nothing yet to tell."""
        self._count(index, delta)
        first, self._started[index] = not self._started[index], True
        choices = self.chunk_choices(index, delta, first)
        options = self.request.stream_options
        usage: dict[str, Any] = {}
        if options is not None and options.continuous_usage_stats:
            usage = {"usage": self.usage()}
        elif options is not None and options.include_usage:
            usage = {"usage": None}
        return [{**self._head(self.chunk_object), "choices": [choice], **usage} for choice in choices]

    def usage_chunk(self) -> dict[str, Any] | None:
        """The last chunk of a stream that was to end with the usage."""
        if self.request.stream_options is None or not self.request.stream_options.include_usage:
            return None
        return {**self._head(self.chunk_object), "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens so far. A prompt counts once, however many choices it has; cached is what the first found of it."""
        prompt, completion = sum(map(len, self.prompts)), sum(self._output_tokens)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached_tokens)},
        }

    def prompt_of(self, index: int) -> list[int]:
        return self.prompts[index // self.choices_per_prompt]

    def worth_telling(self, delta: Delta) -> bool:
        """Whether a delta says anything; half a character of text does not."""
        says_more = delta.logprobs is not None or self.request.return_token_ids
        return bool(delta.text or delta.finish_reason or says_more)

    def common_fields(self, index: int, delta: Delta) -> dict[str, Any]:
        """What a choice says of a delta in completions and in chat."""
        fields = {"index": index, "finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
        return {**fields, "token_ids": delta.token_ids} if self.request.return_token_ids else fields

    def prompt_report(self, delta: Delta) -> dict[str, Any]:
        """The field `prompt_logprobs` as vLLM has it, where it was asked for."""
        if self.request.prompt_logprobs is None:
            return {}
        return {"prompt_logprobs": [step and self._by_token(step) for step in delta.prompt_logprobs or ()]}

    def _by_token(self, step: TokenLogprobs) -> dict[str, dict[str, Any]]:
        ranked = [(rank, *pair) for rank, pair in enumerate(step.top[: self.request.prompt_logprobs], 1)]
        return {
            str(token): {"logprob": finite(logprob), "rank": rank, "decoded_token": self.token_text(token)}
            for rank, token, logprob in [(step.rank, step.token_id, step.logprob), *ranked]
        }

    def token_text(self, token_id: int) -> str:
        return self.tokenizer.token_bytes(token_id).decode("utf-8", errors="replace")

    def _count(self, index: int, delta: Delta) -> None:
        self._output_tokens[index] = delta.output_tokens
        prompt, choice = divmod(index, self.choices_per_prompt)
        if choice == 0:
            self._cached_tokens[prompt] = delta.cached_tokens

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model_name}

    def _works(self, ready: Ready) -> list[tuple[list[int], SamplingParams]]:
        n = self.choices_per_prompt
        if n * len(self.prompts) > MAX_CHOICES:
            raise ApiError(400, f"{len(self.prompts)} prompts with n={n} are more than {MAX_CHOICES} choices", "n")
        if self.request.priority and ready.scheduling_policy != "priority":
            raise ApiError(400, "a priority counts only where the server has --scheduling-policy priority", "priority")
        given = self.request.model_dump(include=set(PARAMETER_NAMES), exclude_none=True)
        reports = {"logprobs": self.logprobs(), "prompt_logprobs": self.prompt_logprobs()}
        options = {**ready.default_sampling, **given, **reports}
        works: list[tuple[list[int], SamplingParams]] = []
        for prompt in self.prompts:
            params = SamplingParams(**{**options, "max_tokens": self._check_length(prompt, ready)})
            works += [(prompt, params.of_choice(choice)) for choice in range(params.n)]
        self._check_tokens(works[0][1], ready)
        return works

    def _check_tokens(self, params: SamplingParams, ready: Ready) -> None:
        """Refuse here what the engine would refuse when an answer may have begun."""
        last = ready.vocab_size - 1
        for name, tokens in params.named_tokens.items():
            if not 0 <= min(tokens) <= max(tokens) <= last:
                raise ApiError(400, f"{name} must hold token ids between 0 and {last}", name)
        TokenRules.of(params, self.tokenizer, self.tokenizer.eos_ids, ready.vocab_size)

    def _check_length(self, prompt: list[int], ready: Ready) -> int | None:
        """The max_tokens of a prompt that the model can take. Raises InputError for one that it cannot."""
        if not prompt:
            raise InputError("the prompt is empty; it must hold at least one token")
        longest = ready.max_model_len
        if len(prompt) >= longest:
            raise InputError(
                f"the prompt has {len(prompt)} tokens, but prompt and output together have at most {longest}"
            )
        if not 0 <= min(prompt) <= max(prompt) < ready.vocab_size:
            raise InputError(f"the prompt holds a token id outside the vocabulary of 0 to {ready.vocab_size - 1}")
        limit = self.max_tokens(longest - len(prompt))
        if limit is not None and len(prompt) + limit > longest:
            raise InputError(
                f"the prompt has {len(prompt)} tokens and max_tokens asks for {limit} more, "
                f"but prompt and output together have at most {longest}"
            )
        return limit


def encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """The tokens of a text. Raises InputError for what JSON can write but Unicode forbids."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError("the prompt holds half of a surrogate pair, which is no character") from None
    return tokenizer.encode(text, add_special_tokens)


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold: minus infinity becomes -9999, as in vLLM."""
    return max(logprob, -9999.0)
