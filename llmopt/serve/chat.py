"""POST /v1/chat/completions: a conversation in, the next message out."""

from typing import Any

from llmopt.engine.outputs import Delta, TokenLogprobs
from llmopt.errors import InputError
from llmopt.model.tokenizer import Tokenizer
from llmopt.serve.call import Call, ServedModel, encode, finite
from llmopt.serve.errors import ApiError
from llmopt.serve.schema import ChatRequest

RESERVED_VARIABLES = frozenset(
    {"messages", "tools", "documents", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message",
     "bos_token", "eos_token", "raise_exception", "strftime_now"}
)  # fmt: skip
"""What a request must not set for its chat template, because the server or another field does."""


class ChatCall(Call):
    """One chat request: the conversation, written out by the model's chat template, is the prompt."""

    id_prefix = "chatcmpl"
    chunk_object = "chat.completion.chunk"
    answer_object = "chat.completion"

    request: ChatRequest

    def __init__(self, request: ChatRequest, model: ServedModel) -> None:
        text = render_prompt(request, model.tokenizer)
        super().__init__(request, model, [encode(model.tokenizer, text, add_special_tokens=False)])

    def max_tokens(self, room: int) -> int | None:
        given = self.request.max_completion_tokens
        return self.request.max_tokens if given is None else given

    def logprobs(self) -> int | None:
        return (self.request.top_logprobs or 0) if self.request.logprobs else None

    def answer(self, wholes: Any) -> dict[str, Any]:
        body = super().answer(wholes)
        if self.request.return_token_ids:
            body["prompt_token_ids"] = self.prompts[0]
        return {**body, **self.prompt_report(wholes[0])}

    def choice(self, index: int, whole: Delta) -> dict[str, Any]:
        choice = self._choice(index, whole)
        return {**choice, "message": {"role": "assistant", "content": whole.text}}

    def chunk_choices(self, index: int, delta: Delta, first: bool) -> list[dict[str, Any]]:
        choices: list[dict[str, Any]] = []
        if first:
            opening = {"role": "assistant", "content": ""}
            choices.append({"index": index, "delta": opening, "logprobs": None, "finish_reason": None})
        if self.worth_telling(delta):
            content = {"content": delta.text} if delta.text else {}
            choices.append({**self._choice(index, delta), "delta": content})
        return choices

    def _choice(self, index: int, delta: Delta) -> dict[str, Any]:
        logprobs = None if delta.logprobs is None else {"content": [self._step(step) for step in delta.logprobs]}
        return {**self.common_fields(index, delta), "logprobs": logprobs}

    def _step(self, step: TokenLogprobs) -> dict[str, Any]:
        top = [self._token(token, logprob) for token, logprob in step.top]
        return {**self._token(step.token_id, step.logprob), "top_logprobs": top}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        value = self.tokenizer.token_bytes(token_id)
        return {"token": self.token_text(token_id), "logprob": finite(logprob), "bytes": list(value)}


def render_prompt(request: ChatRequest, tokenizer: Tokenizer) -> str:
    """The prompt for a conversation. Raises InputError where the template refuses it."""
    variables = request.chat_template_kwargs or {}
    for name in variables:
        if name in RESERVED_VARIABLES or not name.isidentifier():
            raise ApiError(400, f"chat_template_kwargs must not hold {name!r:.80}", "chat_template_kwargs")
    add_prompt = request.add_generation_prompt
    if add_prompt is None:
        add_prompt = not request.continue_final_message
    messages = [message.as_variables() for message in request.messages]
    text = tokenizer.render_chat(messages, add_generation_prompt=add_prompt, **variables)
    return _cut_after(text, messages[-1]["content"]) if request.continue_final_message else text


def _cut_after(text: str, final: str) -> str:
    """A rendered conversation without what the template writes after its last message, so that it can go on."""
    content = final if final in text else final.strip()  # templates may trim a message
    if not content or content not in text:
        raise InputError("continue_final_message needs a last message whose text the chat template keeps as it is")
    return text[: text.rindex(content) + len(content)]
