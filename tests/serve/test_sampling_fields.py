"""Every sampling field over HTTP, from a server with a small model: what it does, and what it may not be."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch

LAST = 319  # the vocabulary's last token
PROMPT = [20, 31, 7, 250, 99, 12, 180, 44]


@pytest.fixture(scope="module")
def url(tiny_model, running_server):
    arguments = ("--port", "0", "--dtype", "float32", "--threads", "1", "--served-model-name", "tiny")
    with running_server(str(tiny_model("llama")[0]), *arguments, "--max-num-batched-tokens", "64") as server:
        yield server.url


def post(url: str, path: str = "completions", **body: Any) -> httpx.Response:
    prompt = {"prompt": PROMPT} if path == "completions" else {"messages": [{"role": "user", "content": "the cat"}]}
    content = json.dumps({**prompt, "temperature": 0, "max_tokens": 6, **body})
    return httpx.post(f"{url}/v1/{path}", content=content, headers={"Content-Type": "application/json"}, timeout=60)


def complete(url: str, path: str = "completions", **body: Any) -> dict[str, Any]:
    response = post(url, path, **body)
    assert response.status_code == 200, response.text
    return response.json()


def tokens(url: str, **body: Any) -> list[int]:
    return complete(url, return_token_ids=True, ignore_eos=True, **body)["choices"][0]["token_ids"]


def model_logprobs(tiny_model, sequence: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return tiny_model("llama")[1](torch.tensor([sequence])).logits[0].log_softmax(-1)


def lm_eval_scores(answer: dict[str, Any], context_lengths: list[int]) -> list[tuple[float, bool]]:
    """The log-probability and whether each token is the likeliest, from what lm-eval's local-completions reads."""
    scores = []
    for choice, length in zip(
        sorted(answer["choices"], key=lambda choice: choice["index"]), context_lengths, strict=True
    ):
        own = choice["logprobs"]["token_logprobs"][length:-1]
        top = choice["logprobs"]["top_logprobs"][length:-1]
        scores.append((sum(own), all(one == max(each.values()) for one, each in zip(own, top, strict=True))))
    return scores


def test_lm_eval_gets_the_models_likelihoods(url: str, tiny_model) -> None:
    contexts = [PROMPT, PROMPT[:3], PROMPT[2:]]
    greedy = tokens(url, prompt=contexts[1], max_tokens=4)
    continuations = [[5, 6, 7], greedy, [100]]
    prompts = [context + continuation for context, continuation in zip(contexts, continuations, strict=True)]
    answer = complete(url, prompt=prompts, max_tokens=1, logprobs=1, echo=True, seed=1234)
    assert all(choice["logprobs"]["token_logprobs"][0] is None for choice in answer["choices"])
    scores = lm_eval_scores(answer, [len(context) for context in contexts])
    for (score, is_greedy), prompt, continuation in zip(scores, prompts, continuations, strict=True):
        rows = model_logprobs(tiny_model, prompt)[-1 - len(continuation) : -1]
        assert score == pytest.approx(rows.gather(1, torch.tensor(continuation)[:, None]).sum().item(), abs=1e-3)
        assert is_greedy == (rows.argmax(-1).tolist() == continuation)
    assert scores[1][1] and not scores[0][1]


def test_lm_eval_scores_a_prompt_longer_than_a_step(url: str, tiny_model) -> None:
    prompt = [(5 * i * i + i) % 300 + 5 for i in range(200)]
    ((score, _),) = lm_eval_scores(complete(url, prompt=[prompt], max_tokens=1, logprobs=1, echo=True), [1])
    rows = model_logprobs(tiny_model, prompt)[:-1]
    assert score == pytest.approx(rows.gather(1, torch.tensor(prompt[1:])[:, None]).sum().item(), abs=0.02)


def test_echo_with_logprobs_is_the_same_streamed(url: str) -> None:
    whole = complete(url, prompt="the cat", echo=True, logprobs=2)["choices"][0]
    body = {"prompt": "the cat", "temperature": 0, "max_tokens": 6, "echo": True, "logprobs": 2, "stream": True}
    lists: dict[str, list] = {name: [] for name in whole["logprobs"]}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                for name, values in json.loads(line[6:])["choices"][0]["logprobs"].items():
                    lists[name] += values
    assert lists == whole["logprobs"]


def test_echo_alone(url: str, tiny_model) -> None:
    answer = complete(url, echo=True, max_tokens=0, logprobs=0)
    (choice,) = answer["choices"]
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (8, 0)
    rows = model_logprobs(tiny_model, PROMPT)
    expected = rows[:-1].gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0].tolist()
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(expected, abs=1e-3)
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_prompt_logprobs(url: str, path: str) -> None:
    answer = complete(url, path, prompt_logprobs=2, return_token_ids=True)
    holder = answer["choices"][0] if path == "completions" else answer
    first, *others = holder["prompt_logprobs"]
    assert first is None and len(others) == answer["usage"]["prompt_tokens"] - 1
    for token, entries in zip(holder["prompt_token_ids"][1:], others, strict=True):
        assert len(entries) in (2, 3)
        own = entries[str(token)]
        assert own["rank"] >= 1 and math.exp(own["logprob"]) <= 1
        assert (own["rank"] == 1) == (own["logprob"] == max(entry["logprob"] for entry in entries.values()))


def test_fields_that_change_what_is_chosen(url: str) -> None:
    free = tokens(url)
    assert len(free) == 6
    assert tokens(url, logit_bias={"9": 100}) == [9] * 6
    assert free[0] not in tokens(url, logit_bias={str(free[0]): -100})
    assert set(tokens(url, allowed_token_ids=[9, 10])) <= {9, 10}
    assert tokens(url, temperature=1, top_k=1) == tokens(url, temperature=1, top_p=1e-6) == free
    assert tokens(url, temperature=1, min_p=1.0) == free
    assert len(set(tokens(url, logit_bias={"9": 50, "10": 49}, presence_penalty=2))) == 2
    assert set(tokens(url, logit_bias={"9": 50, "10": 49}, frequency_penalty=0.5)) == {9, 10}
    assert tokens(url, logit_bias={"9": 10}) == [9] * 6
    assert tokens(url, logit_bias={"9": 10}, repetition_penalty=100).count(9) == 1
    answer = complete(url, stop_token_ids=[free[2]])["choices"][0]
    assert (answer["finish_reason"], answer["stop_reason"]) == ("stop", free[2])
    letters = {"allowed_token_ids": tokens_of(url, "qxz")}
    text = complete(url, **letters)["choices"][0]["text"]
    assert text[:2] not in complete(url, bad_words=[text[:2]], **letters)["choices"][0]["text"]
    stopped = complete(url, stop=[text[1:3]], **letters)["choices"][0]
    assert (stopped["text"], stopped["finish_reason"]) == (text[: text.index(text[1:3])], "stop")
    included = complete(url, stop=[text[1:3]], include_stop_str_in_output=True, **letters)["choices"][0]
    assert included["text"] == stopped["text"] + text[1:3]


def tokens_of(url: str, text: str) -> list[int]:
    return complete(url, prompt=text, return_token_ids=True)["choices"][0]["prompt_token_ids"]


def test_min_tokens_keeps_the_end_away(url: str) -> None:
    end = 2
    biased = {"logit_bias": {str(end): 100}, "return_token_ids": True}
    assert complete(url, **biased)["choices"][0]["token_ids"] == [end]
    answer = complete(url, min_tokens=3, **biased)["choices"][0]
    assert answer["token_ids"].index(end) == 3 and answer["finish_reason"] == "stop"
    assert complete(url, ignore_eos=True, **biased)["choices"][0]["token_ids"] == [end] * 6
    (letter,) = tokens_of(url, "q")
    only = {"allowed_token_ids": [letter], "stop": ["q"], "return_token_ids": True}
    for fewest, text in ((0, ""), (2, "qq"), (6, "qqqqqq")):
        answer = complete(url, min_tokens=fewest, **only)["choices"][0]
        assert (answer["text"], len(answer["token_ids"])) == (text, min(fewest + 1, 6))


def test_chat_takes_them_too(url: str) -> None:
    body = {"logit_bias": {"9": 100}, "logprobs": True, "top_logprobs": 1, "ignore_eos": True, "return_token_ids": True}
    choice = complete(url, "chat/completions", **body)["choices"][0]
    assert choice["token_ids"] == [9] * 6
    assert all(len(entry["top_logprobs"]) == 1 for entry in choice["logprobs"]["content"])


def test_a_seeded_request_gets_the_same_alone_and_among_others(url: str) -> None:
    own = {"seed": 5, "temperature": 1.3, "top_p": 0.9, "n": 2, "max_tokens": 20, "return_token_ids": True}
    others: list[dict[str, Any]] = [
        {"prompt": PROMPT * 9, "logprobs": 1, "echo": True},
        {"temperature": 1.0, "max_tokens": 30, "ignore_eos": True},
        {"allowed_token_ids": [5, 6], "max_tokens": 25, "ignore_eos": True},
        {"bad_words": ["the"], "presence_penalty": 1, "max_tokens": 25, "ignore_eos": True},
    ]
    alone = [choice["token_ids"] for choice in complete(url, **own)["choices"]]
    assert alone[0] != alone[1]
    with ThreadPoolExecutor(12) as pool:
        busy = [pool.submit(complete, url, **body) for body in others * 2]
        answers = [pool.submit(complete, url, **own) for _ in range(4)]
        assert all([choice["token_ids"] for choice in each.result()["choices"]] == alone for each in answers)
        for each in busy:
            each.result()


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize(
    ("body", "says", "param"),
    [
        ({"n": 0}, "n must be between 1 and 128, not 0", None),
        ({"temperature": 2.5}, "temperature must be between 0 and 2, not 2.5", None),
        ({"top_p": 0}, "top_p must be above 0; for greedy decoding give temperature 0", None),
        ({"top_k": -2}, "top_k must be between 0 and 2147483648, not -2", None),
        ({"min_p": 1.1}, "min_p must be between 0 and 1, not 1.1", None),
        ({"presence_penalty": 3}, "presence_penalty must be between -2 and 2, not 3.0", None),
        ({"frequency_penalty": -3}, "frequency_penalty must be between -2 and 2, not -3.0", None),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0; 1 means none", None),
        ({"seed": 2**64}, f"seed must be between {-(2**63)} and {2**64 - 1}, not {2**64}", None),
        ({"stop": [""]}, "a stop string must not be empty", None),
        ({"stop": "\ud800"}, "stop holds half of a surrogate pair, which is no character", None),
        ({"stop_token_ids": [LAST + 1]}, "stop_token_ids must hold token ids between 0 and 319", "stop_token_ids"),
        ({"include_stop_str_in_output": 1}, "include_stop_str_in_output: input should be a valid boolean",
         "include_stop_str_in_output"),
        ({"ignore_eos": "yes"}, "ignore_eos: input should be a valid boolean", "ignore_eos"),
        ({"min_tokens": 7}, "min_tokens (7) must not exceed max_tokens (6)", None),
        ({"max_tokens": 0}, "max_tokens must be between 1 and 2147483648, not 0", None),
        ({"prompt_logprobs": 21}, "prompt_logprobs must be between 0 and 20, not 21", None),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs go with answers that are not streamed only",
         "prompt_logprobs"),
        ({"logit_bias": {"320": 1}}, "logit_bias must hold token ids between 0 and 319", "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias must be between -100 and 100, not 101.0 (token 5)", None),
        ({"logit_bias": {"a": 1}}, "the keys of logit_bias must be token ids, such as \"50\", not 'a'", None),
        ({"logit_bias": 3}, "logit_bias: must be an object of at most 1024 numbers by token id, such as {\"50\": -100}",
         "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids must hold at least one token; leave it out to allow all", None),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids must hold token ids between 0 and 319", "allowed_token_ids"),
        ({"allowed_token_ids": [2], "min_tokens": 1, "stream": True},
         "nothing is left to choose: bad_words or min_tokens rule out all of allowed_token_ids", None),
        ({"bad_words": [""]}, "a bad word must hold more than spaces", None),
        ({"bad_words": [3]}, "bad_words: must be a list of at most 128 strings of at most 200 characters", "bad_words"),
    ],
)  # fmt: skip
def test_what_a_field_may_not_be(url: str, path: str, body: dict, says: str, param: str | None) -> None:
    response = post(url, path, **body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["message"], error["param"], error["type"]) == (says, param, "invalid_request_error")


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("completions", {"logprobs": 21}, "logprobs must be between 0 and 20, not 21"),
        ("completions", {"echo": "yes"}, "echo: input should be a valid boolean"),
        ("chat/completions", {"logprobs": 1}, "logprobs: input should be a valid boolean"),
        ("chat/completions", {"top_logprobs": 1}, "top_logprobs goes with logprobs: true only"),
        ("chat/completions", {"max_completion_tokens": 0, "max_tokens": None}, "max_tokens must be between 1"),
    ],
)
def test_what_one_of_the_two_has_alone(url: str, path: str, body: dict, says: str) -> None:
    response = post(url, path, **body)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(says)
