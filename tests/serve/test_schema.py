import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from llmopt.serve.errors import ApiError, describe
from llmopt.serve.schema import LABELS, NOT_SUPPORTED, ChatRequest, CompletionRequest

BIAS = 'an object of at most 1024 numbers by token id, such as {"50": -100}'
MESSAGES = [{"role": "user", "content": "hi"}]


def complaint(model, **body) -> str:
    with pytest.raises((ValidationError, ApiError)) as caught:
        model.model_validate(body)
    if isinstance(caught.value, ApiError):
        return caught.value.detail
    first = caught.value.errors()[0]
    return describe({**first, "loc": ("body", *first["loc"])}, list(model.model_fields))[0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"temprature": 1}, "unknown field 'temprature'; did you mean 'temperature'?"),
        ({"messages": MESSAGES}, "unknown field 'messages'"),
        ({"temperature": "0.5"}, "temperature: input should be a valid number"),
        ({"max_tokens": True}, "max_tokens: input should be a valid integer"),
        ({"max_tokens": 1.5}, "max_tokens: input should be a valid integer"),
        ({"stop": 3}, "stop: must be a string or a list of at most 64 strings"),
        ({"stop": ["a", 3]}, "stop: must be a string or a list of at most 64 strings"),
        ({"stop": ["a"] * 65}, "stop: must be a string or a list of at most 64 strings"),
        ({"cache_salt": ""}, "cache_salt: string should have at least 1 character"),
        (
            {"cache_salt": "\ud800"},
            "cache_salt: input should be a valid string, unable to parse raw data as a unicode string",
        ),
        ({"priority": 2**40}, "priority: input should be less than 2147483648"),
        ({"priority": 0.5}, "priority: input should be a valid integer"),
        ({"suffix": "x"}, "suffix is not supported yet; leave it out"),
        ({"best_of": 2}, "best_of is not supported yet; leave it out"),
        ({"logit_bias": [1]}, f"logit_bias: must be {BIAS}"),
        ({"logit_bias": {"50": "1"}}, f"logit_bias: must be {BIAS}"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, f"logit_bias: must be {BIAS}"),
        ({"allowed_token_ids": ["50"]}, "allowed_token_ids: must be a list of at most 1024 token ids"),
        ({"allowed_token_ids": [1] * 1025}, "allowed_token_ids: must be a list of at most 1024 token ids"),
        ({"stop_token_ids": 5}, "stop_token_ids: must be a list of at most 1024 token ids"),
        ({"bad_words": "no"}, "bad_words: must be a list of at most 128 strings of at most 200 characters"),
        ({"bad_words": ["a"] * 129}, "bad_words: must be a list of at most 128 strings of at most 200 characters"),
        ({"bad_words": ["\ud800"]}, "bad_words: must be a list of at most 128 strings of at most 200 characters"),
        ({"bad_words": ["a" * 201]}, "bad_words: must be a list of at most 128 strings of at most 200 characters"),
        ({"prompt_logprobs": True}, "prompt_logprobs: input should be a valid integer"),
        ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs go with answers that are not streamed only"),
        ({"stream_options": {"include_usage": True}}, "stream_options go with stream: true only"),
        ({"stream": True, "stream_options": {"x": 1}}, "unknown field 'stream_options.x'"),
    ],
)
def test_bad_completion_fields_get_one_clear_line(body, message):
    assert complaint(CompletionRequest, prompt="a", **body) == message


@pytest.mark.parametrize("prompt", [[], [1, "a"], [True], [[1], "a"], [[1], []], [[1.0]], 3, None, [[[1]]], {}])
def test_bad_prompts_are_refused(prompt):
    assert complaint(CompletionRequest, prompt=prompt).startswith("prompt: must be a string, a list of")


@pytest.mark.parametrize("prompt", ["", "a", ["a", "b"], [1, 2], [[1], [2, 3]]])
def test_four_kinds_of_prompt(prompt):
    assert CompletionRequest(prompt=prompt).prompt == prompt


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": []}, "messages: list should have at least 1 item after validation, not 0"),
        ({}, "messages is missing"),
        ({"messages": MESSAGES, "logprobs": 3}, "logprobs: input should be a valid boolean"),
        ({"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs goes with logprobs: true only"),
        (
            {"messages": MESSAGES, "logprobs": True, "top_logprobs": 21},
            "top_logprobs: input should be less than or equal to 20",
        ),
        (
            {"messages": MESSAGES, "max_tokens": 1, "max_completion_tokens": 2},
            "max_tokens and max_completion_tokens differ; give one of them",
        ),
        (
            {"messages": MESSAGES, "add_generation_prompt": True, "continue_final_message": True},
            "add_generation_prompt and continue_final_message exclude each other",
        ),
        ({"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools is not supported yet; leave it out"),
        (
            {"messages": MESSAGES, "response_format": {"type": "json_object"}},
            "response_format is not supported yet; leave it out",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content: content of type 'image_url' is not supported; only text is",
        ),
        (
            {"messages": [{"role": "user", "content": 1}]},
            'messages.0.content: must be a string or a list of {"type": "text", "text": ...} parts',
        ),
        ({"messages": [{"role": "user"}]}, "messages.0.content is missing"),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}]},
            "tool calls in messages are not supported yet",
        ),
    ],
)
def test_bad_chat_fields_get_one_clear_line(body, message):
    assert complaint(ChatRequest, **body) == message


@given(st.text(min_size=1).filter(lambda name: name not in CompletionRequest.model_fields))
def test_no_field_is_accepted_and_ignored(name):
    if name in LABELS or name in NOT_SUPPORTED:
        return
    assert complaint(CompletionRequest, prompt="a", **{name: 1}).startswith("unknown field")


@pytest.mark.parametrize("name", sorted(NOT_SUPPORTED))
def test_unsupported_fields_pass_only_where_they_ask_for_nothing(name):
    for value in (None, *NOT_SUPPORTED[name]):
        assert CompletionRequest.model_validate({"prompt": "a", name: value}).prompt == "a"
    assert complaint(CompletionRequest, prompt="a", **{name: {"ask": "much"}}) == (
        f"{name} is not supported yet; leave it out"
    )


def test_labels_are_taken():
    body = {"messages": MESSAGES, "user": "me", "metadata": {"run": "7"}, "store": False}
    assert ChatRequest.model_validate(body).messages[0].content == "hi"


def test_an_answer_can_be_sent_back_as_it_came():
    message = {"role": "assistant", "content": "hello", "refusal": None, "tool_calls": None, "annotations": []}
    assert ChatRequest.model_validate({"messages": [message]}).messages[0].as_variables() == {
        "role": "assistant",
        "content": "hello",
    }


def test_text_parts_become_lines():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    request = ChatRequest.model_validate({"messages": [{"role": "user", "content": parts, "name": "ann"}]})
    assert request.messages[0].as_variables() == {"role": "user", "content": "one\ntwo", "name": "ann"}
