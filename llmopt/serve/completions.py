"""POST /v1/completions: text or tokens in, text out."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from llmopt.engine.outputs import Delta, TokenLogprobs
from llmopt.serve.call import Call, ServedModel, encode, finite
from llmopt.serve.schema import CompletionRequest, Prompt

DEFAULT_MAX_TOKENS = 16


class CompletionCall(Call):
    """One completion request. With `echo`, each choice begins with its prompt, and so do its log-probabilities."""

    id_prefix = "cmpl"
    chunk_object = answer_object = "text_completion"

    request: CompletionRequest

    def __init__(self, request: CompletionRequest, model: ServedModel) -> None:
        self._given = _as_list(request.prompt)
        prompts = [encode(model.tokenizer, each, True) if isinstance(each, str) else each for each in self._given]
        super().__init__(request, model, prompts)
        self._offsets = [0] * len(self.works)

    @property
    def echoes_only(self) -> bool:
        """Whether nothing is to be generated. The engine then generates a token, which is not told."""
        return bool(self.request.echo) and self.request.max_tokens == 0

    def max_tokens(self, room: int) -> int | None:
        given = self.request.max_tokens
        if self.echoes_only:
            return 1
        return min(DEFAULT_MAX_TOKENS, room) if given is None else given

    def logprobs(self) -> int | None:
        return self.request.logprobs

    def prompt_logprobs(self) -> int | None:
        wanted = [self.request.prompt_logprobs, self.request.logprobs if self.request.echo else None]
        return max((count for count in wanted if count is not None), default=None)

    def answer(self, wholes: Sequence[Delta]) -> dict[str, Any]:
        return super().answer([self._asked_for(whole) for whole in wholes])

    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        return super().chunks(index, self._asked_for(delta))

    def choice(self, index: int, whole: Delta) -> dict[str, Any]:
        return {**self._choice(index, whole, first=True), **self.prompt_report(whole)}

    def chunk_choices(self, index: int, delta: Delta, first: bool) -> list[dict[str, Any]]:
        echoes = first and self.request.echo
        return [self._choice(index, delta, first)] if echoes or self.worth_telling(delta) else []

    def _asked_for(self, delta: Delta) -> Delta:
        """A delta without the token that nobody wanted."""
        if not self.echoes_only:
            return delta
        nothing: dict[str, Any] = {"text": "", "token_ids": [], "output_tokens": 0, "stop_reason": None}
        return replace(delta, **nothing, logprobs=None if delta.logprobs is None else [], finish_reason="length")

    def _choice(self, index: int, delta: Delta, first: bool) -> dict[str, Any]:
        text, steps = delta.text, delta.logprobs
        if first and self.request.echo:
            text = self._prompt_text(index) + text
            steps = None if steps is None else [*(delta.prompt_logprobs or ()), *steps]
        logprobs = None if steps is None else self._logprobs(index, steps)
        choice = {**self.common_fields(index, delta), "text": text, "logprobs": logprobs}
        if first and self.request.return_token_ids:
            choice["prompt_token_ids"] = self.prompt_of(index)
        return choice

    def _prompt_text(self, index: int) -> str:
        prompt = self._given[index // self.choices_per_prompt]
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)

    def _logprobs(self, index: int, steps: Sequence[TokenLogprobs | None]) -> dict[str, list[Any]]:
        """OpenAI's four parallel lists; `text_offset` counts characters, each token's taken for itself.

        A step is None for the first token of a prompt, which has a null for each of its log-probabilities.
        """
        tokens = [self.prompt_of(index)[0] if step is None else step.token_id for step in steps]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(self.token_text(token))
        return {
            "tokens": [self._token_name(token) for token in tokens],
            "token_logprobs": [step and finite(step.logprob) for step in steps],
            "top_logprobs": [step and self._top(step) for step in steps],
            "text_offset": offsets,
        }

    def _top(self, step: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens and, where it is none of them, the chosen one; of two with one name, the likelier."""
        top: dict[str, float] = {}
        for token, logprob in (*step.top[: self.request.logprobs], (step.token_id, step.logprob)):
            top.setdefault(self._token_name(token), finite(logprob))
        return top

    def _token_name(self, token_id: int) -> str:
        """A token as text, or by its bytes where it is only part of a character, so that no two look the same."""
        value = self.tokenizer.token_bytes(token_id)
        try:
            return value.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in value)


def _as_list(prompt: Prompt) -> list[str | list[int]]:
    """Each prompt of the `prompt` field, be it one or several."""
    several = isinstance(prompt, list) and isinstance(prompt[0], str | list)
    return cast(list[str | list[int]], prompt if several else [prompt])
