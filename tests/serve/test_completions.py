from dataclasses import replace

import pytest
from msgspec import structs

from llmopt.engine.outputs import Delta, TokenLogprobs
from llmopt.errors import InputError
from llmopt.serve import call as call_module
from llmopt.serve.completions import CompletionCall
from llmopt.serve.errors import ApiError
from llmopt.serve.schema import CompletionRequest


def call(served_model, **body) -> CompletionCall:
    return CompletionCall(CompletionRequest.model_validate({"prompt": "abc", **body}), served_model)


def whole(text="hello", tokens=(1, 2), logprobs=None, finish="length") -> Delta:
    return Delta("r", text, list(tokens), logprobs, finish, None, 3, len(tokens))


def usage(prompt: int, completion: int, cached: int = 0) -> dict:
    tokens = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return {**tokens, "prompt_tokens_details": {"cached_tokens": cached}}


def test_every_prompt_gets_n_choices_with_their_own_seeds(served_model):
    made = call(served_model, prompt=["a", "bc"], n=2, seed=7, temperature=0.5)
    encode = served_model.tokenizer.encode
    assert [prompt for prompt, _ in made.works] == [encode("a"), encode("a"), encode("bc"), encode("bc")]
    assert [params.seed for _, params in made.works] == [7, 8, 7, 8]
    assert {(params.n, params.temperature, params.max_tokens) for _, params in made.works} == {(1, 0.5, 16)}
    body = made.answer([whole("w"), whole("x"), whole("y"), whole("z")])
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(0, "w"), (1, "x"), (2, "y"), (3, "z")]
    assert body["usage"] == usage(3, 8)


def test_token_prompts_are_taken_as_they_are(served_model):
    assert call(served_model, prompt=[1, 2]).prompts == [[1, 2]]
    assert call(served_model, prompt=[[1, 2], [3]]).prompts == [[1, 2], [3]]


def test_all_sampling_fields_reach_the_engine(served_model):
    fields = {
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "min_tokens": 2,
        "skip_special_tokens": False,
        "logprobs": 4,
        "prompt_logprobs": 3,
        "seed": 5,
    }
    lists = {"stop_token_ids": [5], "allowed_token_ids": [5, 6], "bad_words": ["no"]}
    ((_, params),) = call(served_model, stop="x", max_tokens=9, logit_bias={"7": -5}, **fields, **lists).works
    assert {name: getattr(params, name) for name in fields} == fields
    assert {name: list(getattr(params, name)) for name in lists} == lists
    assert (params.stop, params.max_tokens, params.logit_bias) == (("x",), 9, {7: -5.0})


def test_the_models_own_sampling_is_the_default_and_only_that(served_model):
    ready = structs.replace(served_model.ready, default_sampling={"temperature": 0.6, "top_k": 20})
    object.__setattr__(served_model, "ready", ready)
    ((_, params),) = call(served_model, top_k=3).works
    assert (params.temperature, params.top_k) == (0.6, 3)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": ""}, "the prompt is empty; it must hold at least one token"),
        ({"prompt": "x" * 100}, "the prompt has 100 tokens, but prompt and output together have at most 100"),
        ({"prompt": "x" * 90, "max_tokens": 11}, "the prompt has 90 tokens and max_tokens asks for 11 more"),
        ({"prompt": [257]}, "the prompt holds a token id outside the vocabulary of 0 to 256"),
        ({"prompt": [-1]}, "the prompt holds a token id outside the vocabulary"),
        ({"max_tokens": 0}, "max_tokens must be between 1"),
        ({"n": 0}, "n must be between 1 and 128"),
        ({"n": 129}, "n must be between 1 and 128"),
        ({"temperature": -1}, "temperature must be between 0"),
        ({"top_p": float("nan")}, "top_p must be between 0"),
        ({"logprobs": 21}, "logprobs must be between 0 and 20"),
        ({"stop": [""]}, "a stop string must not be empty"),
        ({"stop_token_ids": [257]}, "stop_token_ids must hold token ids between 0 and 256"),
        ({"stop_token_ids": [-1]}, "stop_token_ids must hold token ids between 0 and 256"),
        ({"logit_bias": {"257": 1}}, "logit_bias must hold token ids between 0 and 256"),
        ({"logit_bias": {"-1": 1}}, "logit_bias must hold token ids between 0 and 256"),
        ({"logit_bias": {"5": 100.5}}, r"logit_bias must be between -100 and 100, not 100.5 \(token 5\)"),
        ({"logit_bias": {"five": 1}}, "the keys of logit_bias must be token ids"),
        ({"allowed_token_ids": []}, "allowed_token_ids must hold at least one token; leave it out to allow all"),
        ({"allowed_token_ids": [300]}, "allowed_token_ids must hold token ids between 0 and 256"),
        ({"allowed_token_ids": [256], "min_tokens": 1}, "nothing is left to choose"),
        ({"bad_words": [" "]}, "a bad word must hold more than spaces"),
        ({"stop": "\ud800"}, "stop holds half of a surrogate pair"),
        ({"prompt_logprobs": 21}, "prompt_logprobs must be between 0 and 20"),
        ({"prompt_logprobs": -1}, "prompt_logprobs must be between 0 and 20"),
        ({"prompt": "\ud800"}, "the prompt holds half of a surrogate pair"),
        ({"seed": 2**64 - 1, "n": 2}, "seed must be between"),
    ],
)
def test_what_the_model_cannot_do_is_refused_with_the_numbers(served_model, body, message):
    with pytest.raises((InputError, ApiError), match=message):
        call(served_model, **body)


def test_the_default_length_gives_way_to_a_long_prompt(served_model):
    ((_, params),) = call(served_model, prompt="x" * 95).works
    assert params.max_tokens == 5


def test_a_flood_of_choices_is_refused(served_model, monkeypatch):
    monkeypatch.setattr(call_module, "MAX_CHOICES", 5)
    assert len(call(served_model, prompt=["a"] * 5).works) == 5
    with pytest.raises(ApiError, match="3 prompts with n=2 are more than 5 choices"):
        call(served_model, prompt=["a"] * 3, n=2)


def test_echo_puts_the_prompt_before_the_text_once(served_model):
    tokens = served_model.tokenizer.encode("née")
    made = call(served_model, prompt=[tokens, tokens], echo=True)
    assert [choice["text"] for choice in made.answer([whole("x"), whole("y")])["choices"]] == ["néex", "néey"]
    streamed = [made.chunks(1, whole(text, finish=None)) for text in ("a", "b")]
    assert [chunk["choices"][0]["text"] for chunks in streamed for chunk in chunks] == ["néea", "b"]


def test_logprobs_are_openais_four_lists(served_model):
    a, b = served_model.tokenizer.encode("ab")
    half = served_model.tokenizer.encode("é")[0]
    steps = [TokenLogprobs(a, -0.5, 1, [(a, -0.5), (half, -2.0)]), TokenLogprobs(b, float("-inf"), 9, [(a, -0.1)])]
    made = call(served_model, logprobs=2)
    assert made.answer([whole("ab", (a, b), steps)])["choices"][0]["logprobs"] == {
        "tokens": ["a", "b"],
        "token_logprobs": [-0.5, -9999.0],
        "top_logprobs": [{"a": -0.5, "bytes:\\xc3": -2.0}, {"a": -0.1, "b": -9999.0}],
        "text_offset": [0, 1],
    }


def prompt_steps(tokens, top) -> list:
    return [None, *(TokenLogprobs(token, -float(place), 2, top) for place, token in enumerate(tokens[1:], 1))]


def test_echo_with_logprobs_begins_with_those_of_the_prompt(served_model):
    made = call(served_model, prompt="abc", echo=True, logprobs=1)
    a, b, c = made.prompts[0]
    ((_, params),) = made.works
    assert (params.logprobs, params.prompt_logprobs) == (1, 1)
    delta = replace(
        whole("a", (a,), [TokenLogprobs(a, -0.25, 1, [(a, -0.25)])]),
        prompt_logprobs=prompt_steps([a, b, c], [(a, -0.5)]),
    )
    choice = made.answer([delta])["choices"][0]
    assert choice["text"] == "abca"
    assert choice["logprobs"] == {
        "tokens": ["a", "b", "c", "a"],
        "token_logprobs": [None, -1.0, -2.0, -0.25],
        "top_logprobs": [None, {"a": -0.5, "b": -1.0}, {"a": -0.5, "c": -2.0}, {"a": -0.25}],
        "text_offset": [0, 1, 2, 3],
    }
    streamed = call(served_model, prompt="abc", echo=True, logprobs=1, stream=True)
    first, second = (
        streamed.chunks(0, each)[0]["choices"][0] for each in (delta, replace(delta, prompt_logprobs=None))
    )
    assert (first["text"], first["logprobs"]) == (choice["text"], choice["logprobs"])
    assert (second["text"], second["logprobs"]["text_offset"]) == ("a", [4])


def test_echo_alone_generates_nothing_that_is_told(served_model):
    made = call(served_model, prompt="abc", echo=True, logprobs=0, max_tokens=0, return_token_ids=True)
    ((prompt, params),) = made.works
    assert params.max_tokens == 1
    delta = whole("x", (9,), [TokenLogprobs(9, -0.5, 1, [])], "stop")
    body = made.answer([replace(delta, prompt_logprobs=prompt_steps(prompt, []))])
    (choice,) = body["choices"]
    assert (choice["text"], choice["token_ids"], choice["finish_reason"]) == ("abc", [], "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -2.0]
    assert body["usage"] == usage(3, 0)
    streamed = call(served_model, prompt="abc", echo=True, max_tokens=0, stream=True)
    assert [chunk["choices"][0]["text"] for chunk in streamed.chunks(0, delta)] == ["abc"]
    with pytest.raises(InputError, match="max_tokens must be between 1"):
        call(served_model, max_tokens=0)


def test_prompt_logprobs_are_vllms_objects_by_token(served_model):
    a, b, c = served_model.tokenizer.encode("abc")
    made = call(served_model, prompt="abc", prompt_logprobs=1)
    delta = replace(whole(), prompt_logprobs=[None, TokenLogprobs(b, float("-inf"), 9, [(a, -0.5), (c, -0.75)])])
    assert made.answer([delta])["choices"][0]["prompt_logprobs"] == [
        None,
        {
            str(b): {"logprob": -9999.0, "rank": 9, "decoded_token": "b"},
            str(a): {"logprob": -0.5, "rank": 1, "decoded_token": "a"},
        },
    ]
    assert "prompt_logprobs" not in call(served_model).answer([whole()])["choices"][0]


def test_more_may_be_asked_of_the_prompt_than_of_the_text(served_model):
    made = call(served_model, prompt="ab", prompt_logprobs=2, echo=True, logprobs=1)
    a, b = made.prompts[0]
    assert made.works[0][1].prompt_logprobs == 2
    delta = replace(whole("", (), []), prompt_logprobs=[None, TokenLogprobs(b, -2.0, 2, [(a, -0.5), (b, -2.0)])])
    choice = made.answer([delta])["choices"][0]
    assert len(choice["prompt_logprobs"][1]) == 2
    assert choice["logprobs"]["top_logprobs"] == [None, {"a": -0.5, "b": -2.0}]


def test_of_two_tokens_with_one_name_the_likelier_is_told(served_model):
    (a,) = served_model.tokenizer.encode("a")
    served_model.tokenizer._token_bytes[256] = b"a"
    steps = [TokenLogprobs(a, -3.0, 2, [(256, -0.5)])]
    report = call(served_model, logprobs=1).answer([whole("a", (a,), steps)])["choices"][0]["logprobs"]
    assert (report["token_logprobs"], report["top_logprobs"]) == ([-3.0], [{"a": -0.5}]), "or it would look greedy"


def test_text_offsets_go_on_through_a_stream(served_model):
    (a,) = served_model.tokenizer.encode("a")
    made = call(served_model, logprobs=0)
    chunks = [made.chunks(0, whole("a", (a,), [TokenLogprobs(a, -1.0, 1, [])], None))[0] for _ in range(3)]
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks] == [[0], [1], [2]]


def test_half_a_character_is_not_worth_a_chunk(served_model):
    made = call(served_model, stream=True)
    assert made.chunks(0, whole("", finish=None)) == []
    assert made.chunks(0, whole("", finish="stop"))[0]["choices"][0]["finish_reason"] == "stop"


def test_token_ids_are_returned_on_request(served_model):
    made = call(served_model, return_token_ids=True, stream=True)
    choice = made.answer([whole(tokens=(4, 5))])["choices"][0]
    assert (choice["token_ids"], choice["prompt_token_ids"]) == ([4, 5], made.prompts[0])
    first, second = (made.chunks(0, whole("", (token,), finish=None))[0]["choices"][0] for token in (4, 5))
    assert (first["token_ids"], first["prompt_token_ids"]) == ([4], made.prompts[0])
    assert second["token_ids"] == [5]
    assert "prompt_token_ids" not in second


def test_usage_tells_what_the_first_choice_of_each_prompt_found_in_the_cache(served_model):
    made = call(served_model, prompt=["a", "bc"], n=2)
    wholes = [replace(whole(), cached_tokens=cached) for cached in (0, 100, 16, 100)]
    assert made.answer(wholes)["usage"] == usage(3, 8, cached=16)


def test_a_priority_is_refused_where_it_does_not_count(served_model):
    assert call(served_model, priority=0).works
    with pytest.raises(ApiError) as caught:
        call(served_model, priority=1)
    assert caught.value.detail == "a priority counts only where the server has --scheduling-policy priority"
    assert caught.value.param == "priority"
    object.__setattr__(served_model, "ready", structs.replace(served_model.ready, scheduling_policy="priority"))
    assert call(served_model, priority=1).works


def test_usage_in_a_stream(served_model):
    made = call(served_model, stream=True, stream_options={"include_usage": True})
    assert made.chunks(0, whole())[0]["usage"] is None
    assert made.usage_chunk()["usage"] == usage(3, 2)
    assert made.usage_chunk()["choices"] == []
    running = call(served_model, stream=True, stream_options={"continuous_usage_stats": True})
    assert running.chunks(0, whole(finish=None))[0]["usage"]["completion_tokens"] == 2
    assert running.usage_chunk() is None
