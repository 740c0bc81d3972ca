"""POST /v1/completions: text or tokens in, text out."""

from typing import Any, cast

from llmopt.engine.outputs import Delta, TokenLogprobs
from llmopt.serve.call import Call, ServedModel, encode, finite
from llmopt.serve.schema import CompletionRequest, Prompt

DEFAULT_MAX_TOKENS = 16


class CompletionCall(Call):
    """One completion request. With `echo`, each choice begins with its prompt."""

    id_prefix = "cmpl"
    chunk_object = answer_object = "text_completion"

    request: CompletionRequest

    def __init__(self, request: CompletionRequest, model: ServedModel) -> None:
        self._given = _as_list(request.prompt)
        prompts = [encode(model.tokenizer, each, True) if isinstance(each, str) else each for each in self._given]
        super().__init__(request, model, prompts)
        self._offsets = [0] * len(self.works)

    def max_tokens(self, room: int) -> int | None:
        given = self.request.max_tokens
        return min(DEFAULT_MAX_TOKENS, room) if given is None else given

    def logprobs(self) -> int | None:
        return self.request.logprobs

    def choice(self, index: int, whole: Delta) -> dict[str, Any]:
        choice = self._choice(index, whole, self._echo(index) + whole.text)
        if self.request.return_token_ids:
            choice["prompt_token_ids"] = self.prompt_of(index)
        return choice

    def chunk_choices(self, index: int, delta: Delta, first: bool) -> list[dict[str, Any]]:
        echo = self._echo(index) if first else ""
        if not echo and not self.worth_telling(delta):
            return []
        choice = self._choice(index, delta, echo + delta.text)
        if first and self.request.return_token_ids:
            choice["prompt_token_ids"] = self.prompt_of(index)
        return [choice]

    def _choice(self, index: int, delta: Delta, text: str) -> dict[str, Any]:
        logprobs = None if delta.logprobs is None else self._logprobs(index, delta.logprobs)
        return {**self.common_fields(index, delta), "text": text, "logprobs": logprobs}

    def _echo(self, index: int) -> str:
        if not self.request.echo:
            return ""
        prompt = self._given[index // self.choices_per_prompt]
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)

    def _logprobs(self, index: int, steps: list[TokenLogprobs]) -> dict[str, list[Any]]:
        """OpenAI's four parallel lists; `text_offset` counts characters, each token's taken for itself."""
        tokens = [self._token_name(step.token_id) for step in steps]
        offsets = []
        for step in steps:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(self.token_text(step.token_id))
        return {
            "tokens": tokens,
            "token_logprobs": [finite(step.logprob) for step in steps],
            "top_logprobs": [self._top(step) for step in steps],
            "text_offset": offsets,
        }

    def _top(self, step: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens and, where it is none of them, the chosen one."""
        pairs = [*step.top, (step.token_id, step.logprob)]
        return {self._token_name(token): finite(logprob) for token, logprob in pairs}

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
