from dataclasses import replace

import pytest

from llmopt.engine.outputs import Delta, TokenLogprobs
from llmopt.errors import InputError
from llmopt.serve.chat import RESERVED_VARIABLES, ChatCall, render_prompt
from llmopt.serve.errors import ApiError
from llmopt.serve.schema import ChatRequest

MESSAGES = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]


def request(**body) -> ChatRequest:
    return ChatRequest.model_validate({"messages": MESSAGES, **body})


def call(served_model, **body) -> ChatCall:
    return ChatCall(request(**body), served_model)


def delta(text, finish=None, logprobs=None, tokens=(1,)) -> Delta:
    return Delta("r", text, list(tokens), logprobs, finish, None, 3, len(tokens))


def test_the_template_writes_the_prompt(served_model):
    expected = "<system>be kind<end><user>hi<end><assistant>"
    assert render_prompt(request(), served_model.tokenizer) == expected
    made = call(served_model)
    assert made.prompts == [served_model.tokenizer.encode(expected)]
    assert 256 in made.prompts[0]  # special tokens in the template are tokens, not text


def test_template_variables(served_model):
    tokenizer = served_model.tokenizer
    assert render_prompt(request(chat_template_kwargs={"mood": "!"}), tokenizer).endswith("<assistant>!")
    assert render_prompt(request(add_generation_prompt=False), tokenizer).endswith("hi<end>")


@pytest.mark.parametrize("name", [*sorted(RESERVED_VARIABLES), "no name", "a.b"])
def test_template_variables_that_are_not_the_callers(served_model, name):
    with pytest.raises(ApiError, match="chat_template_kwargs must not hold"):
        render_prompt(request(chat_template_kwargs={name: False}), served_model.tokenizer)


def test_an_answer_can_be_continued(served_model):
    messages = [*MESSAGES, {"role": "assistant", "content": "Dear be kind"}]
    text = render_prompt(request(messages=messages, continue_final_message=True), served_model.tokenizer)
    assert text == "<system>be kind<end><user>hi<end><assistant>Dear be kind"


def test_an_answer_that_the_template_trims_can_be_continued(served_model):
    served_model.tokenizer.chat_template = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"
    messages = [*MESSAGES, {"role": "assistant", "content": "Dear  "}]
    text = render_prompt(request(messages=messages, continue_final_message=True), served_model.tokenizer)
    assert text == "[be kind][hi][Dear"


def test_an_answer_that_the_template_changes_cannot_be_continued(served_model):
    served_model.tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(InputError, match="continue_final_message needs a last message"):
        render_prompt(request(continue_final_message=True), served_model.tokenizer)


def test_length_is_what_the_model_leaves_unless_told(served_model):
    for body, expected in (({}, None), ({"max_tokens": 5}, 5), ({"max_completion_tokens": 6}, 6)):
        ((_, params),) = call(served_model, **body).works
        assert params.max_tokens == expected
    with pytest.raises(InputError, match="max_tokens asks for 99 more"):
        call(served_model, max_tokens=99)


def test_an_answer(served_model):
    made = call(served_model, n=2)
    body = made.answer([delta("hello", "stop"), delta("you", "length")])
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert [choice["message"] for choice in body["choices"]] == [
        {"role": "assistant", "content": "hello"},
        {"role": "assistant", "content": "you"},
    ]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["stop", "length"]
    assert body["usage"]["completion_tokens"] == 2


def test_a_stream_begins_with_the_role_and_ends_with_the_reason(served_model):
    made = call(served_model, stream=True)
    deltas = delta("a"), delta(""), delta("b"), delta("", "stop")
    choices = [chunk["choices"][0] for each in deltas for chunk in made.chunks(0, each)]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": ""},
        {"content": "a"},
        {"content": "b"},
        {},
    ]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "stop"]


def test_logprobs_come_with_their_bytes(served_model):
    first, second = served_model.tokenizer.encode("é")
    steps = [TokenLogprobs(first, -0.5, 1, [(first, -0.5), (second, -1.0)])]
    made = call(served_model, logprobs=True, top_logprobs=2)
    assert made.works[0][1].logprobs == 2
    assert made.answer([delta("", "stop", steps)])["choices"][0]["logprobs"] == {
        "content": [
            {
                "token": "�",
                "logprob": -0.5,
                "bytes": [0xC3],
                "top_logprobs": [
                    {"token": "�", "logprob": -0.5, "bytes": [0xC3]},
                    {"token": "�", "logprob": -1.0, "bytes": [0xA9]},
                ],
            }
        ]
    }
    assert call(served_model, logprobs=True).works[0][1].logprobs == 0
    assert call(served_model, logprobs=False).works[0][1].logprobs is None


def test_what_is_reported_of_the_prompt_stands_beside_the_choices(served_model):
    made = call(served_model, prompt_logprobs=0, n=2)
    assert {params.prompt_logprobs for _, params in made.works} == {0}
    reported = replace(delta("x", "stop"), prompt_logprobs=[None, TokenLogprobs(5, -0.5, 3, [])])
    body = made.answer([reported, reported])
    token = served_model.tokenizer.token_text(5)
    assert body["prompt_logprobs"] == [None, {"5": {"logprob": -0.5, "rank": 3, "decoded_token": token}}]
    assert "prompt_logprobs" not in call(served_model).answer([delta("x", "stop")])


def test_rules_for_tokens_reach_the_engine(served_model):
    ((_, params),) = call(served_model, logit_bias={"5": 1}, allowed_token_ids=[5], bad_words=["x"]).works
    assert (params.logit_bias, params.allowed_token_ids, params.bad_words) == ({5: 1.0}, (5,), ("x",))
    with pytest.raises(ApiError, match="logit_bias must hold token ids between 0 and 256"):
        call(served_model, logit_bias={"1000": 1})


def test_token_ids_are_returned_on_request(served_model):
    made = call(served_model, return_token_ids=True)
    body = made.answer([delta("x", "stop", tokens=(4, 5))])
    assert body["prompt_token_ids"] == made.prompts[0]
    assert body["choices"][0]["token_ids"] == [4, 5]
