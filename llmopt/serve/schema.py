"""The bodies that requests may have: OpenAI's fields and vLLM's extras.

A field that is not known, or known but not supported, is refused by name. Nothing is accepted and then ignored, except
the labels in `LABELS`, which ask nothing of the answer.
"""

from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidatorFunctionWrapHandler, model_validator
from pydantic.functional_validators import PlainValidator, WrapValidator
from pydantic_core import PydanticCustomError

from llmopt.engine.params import MAX_LOGPROBS
from llmopt.serve.errors import ApiError

LABELS = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key"})
"""Fields with which callers label their requests for a provider's own records; there are none here."""

NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_json": (),
    "guided_regex": (),
    "logits_processors": ([],),
    "min_output_tokens": (),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),  # says nothing without tools
    "prediction": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields of others' APIs that are not supported, with the values that ask for nothing and are therefore let through."""


def _validate_as(description: str, value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """Say in one line what a field may be, where pydantic would complain about each kind in turn."""
    try:
        return validate(value)
    except ValidationError:
        raise _wrong(f"must be {description}") from None


def _wrong(message: str) -> PydanticCustomError:
    return PydanticCustomError("wrong", "{message}", {"message": message})


def _check_prompt(value: Any) -> Any:
    # By hand, because pydantic would collect a complaint about every token for every kind of list.
    kinds = {type(item) for item in value} if isinstance(value, list) else None
    is_ids = kinds == {list} and all(item and {type(token) for token in item} == {int} for item in value)
    if not (isinstance(value, str) or kinds in ({str}, {int}) or is_ids):
        raise _wrong("must be a string, a list of strings, a list of token ids or a list of lists of token ids")
    return value


def _check_content(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    for part in value if isinstance(value, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise _wrong(f"content of type {kind!r:.40} is not supported; only text is")
    return _validate_as('a string or a list of {"type": "text", "text": ...} parts', value, validate)


Prompt = Annotated[str | list[str] | list[int] | list[list[int]], PlainValidator(_check_prompt)]
MAX_STOPS = 64  # every one is looked for in every piece of text
Stop = Annotated[
    str | Annotated[list[str], Field(max_length=MAX_STOPS)],
    WrapValidator(partial(_validate_as, f"a string or a list of at most {MAX_STOPS} strings")),
]

MAX_NAMED_TOKENS = 1024  # as in vLLM; each goes to the engine with every choice
MAX_BAD_WORDS, LONGEST_BAD_WORD = 128, 200  # the engine tokenizes them between two steps
_BIAS = f'an object of at most {MAX_NAMED_TOKENS} numbers by token id, such as {{"50": -100}}'
_WORDS = f"a list of at most {MAX_BAD_WORDS} strings of at most {LONGEST_BAD_WORD} characters"
LogitBias = Annotated[
    Annotated[dict[str, float], Field(max_length=MAX_NAMED_TOKENS)], WrapValidator(partial(_validate_as, _BIAS))
]
BadWords = Annotated[
    Annotated[list[Annotated[str, Field(max_length=LONGEST_BAD_WORD)]], Field(max_length=MAX_BAD_WORDS)],
    WrapValidator(partial(_validate_as, _WORDS)),
]
TokenIds = Annotated[
    Annotated[list[int], Field(max_length=MAX_NAMED_TOKENS)],
    WrapValidator(partial(_validate_as, f"a list of at most {MAX_NAMED_TOKENS} token ids")),
]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Body):
    """What a stream carries besides the text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationRequest(_Body):
    """What completions and chat have in common. None stands for a field that was not given."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    n: int | None = None
    stop: Stop | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: LogitBias | None = None
    allowed_token_ids: TokenIds | None = None
    bad_words: BadWords | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    cache_salt: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def refuse_unsupported(cls, body: Any) -> Any:
        """Take out labels and what asks for nothing; refuse what would have to be ignored."""
        if not isinstance(body, dict):
            return body
        for name in body.keys() & NOT_SUPPORTED.keys():
            if body[name] is not None and body[name] not in NOT_SUPPORTED[name]:
                raise ApiError(400, f"{name} is not supported yet; leave it out", name, "not_supported")
        return {name: value for name, value in body.items() if name not in NOT_SUPPORTED and name not in LABELS}

    @model_validator(mode="after")
    def check_stream(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options go with stream: true only", "stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise ApiError(400, "prompt_logprobs go with answers that are not streamed only", "prompt_logprobs")
        return self


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions. With `echo`, `max_tokens` may be 0: the answer is the prompt alone."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: int | None = None


class TextPart(_Body):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | list[TextPart], WrapValidator(_check_content)]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, message: Any) -> Any:
        """Clients send an answer back as they got it, with a null in every field that was not used."""
        if not isinstance(message, dict):
            return message
        if message.get("tool_calls") or message.get("tool_call_id") or message.get("function_call"):
            raise ApiError(400, "tool calls in messages are not supported yet", "messages", "not_supported")
        return {name: value for name, value in message.items() if value is not None and value != []}

    def as_variables(self) -> dict[str, str]:
        """The message as chat templates take it."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": text, **named}


class ChatRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def check_combinations(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs goes with logprobs: true only", "top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ApiError(400, "max_tokens and max_completion_tokens differ; give one of them", "max_tokens")
        if self.add_generation_prompt and self.continue_final_message:
            raise ApiError(400, "add_generation_prompt and continue_final_message exclude each other",
                           "continue_final_message")  # fmt: skip
        return self
