"""The server as its users meet it: a process, a port, the openai client, and a real model."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest

pytestmark = pytest.mark.model

CALM = ("--threads", "1")  # tests share their machine
GREEDY = {"temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def server(smollm2, running_server):
    arguments = ("--port", "0", "--served-model-name", "small", "--max-model-len", "512", "--max-num-seqs", "16", *CALM)
    with running_server(smollm2, *arguments) as started:
        assert started.url
        yield started


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def metric(server, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(f"vllm:{name}{{"))


def is_idle(server) -> bool:
    return not any(metric(server, name) for name in ("num_requests_running", "num_requests_waiting"))


def complete(client, prompt="The capital of France is", **arguments):
    return client.completions.create(model="small", prompt=prompt, **{**GREEDY, **arguments})


def chat(client, text="Name three colours.", **arguments):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
    return client.chat.completions.create(model="small", messages=messages, **{**GREEDY, **arguments})


def test_a_completion_is_the_same_streamed_or_not(client):
    whole = complete(client)
    assert whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (5, 8)
    assert "Paris" in whole.choices[0].text
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_chat_is_the_same_streamed_or_not(client):
    whole = chat(client).choices[0]
    assert whole.message.role == "assistant"
    assert whole.message.content
    chunks = list(chat(client, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == whole.finish_reason


def test_a_chat_ends_by_itself(client):
    choice = chat(client, "Say hello.", max_tokens=100).choices[0]
    assert choice.finish_reason == "stop"
    assert "<|im_end|>" not in choice.message.content


def test_several_choices_differ_and_repeat_with_the_seed(client):
    first, again = (complete(client, n=2, temperature=1.0, seed=3, max_tokens=12) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts[0] != texts[1]
    assert [choice.text for choice in again.choices] == texts
    second_alone = complete(client, temperature=1.0, seed=4, max_tokens=12)
    assert second_alone.choices[0].text == texts[1]


def test_several_prompts_of_text_or_tokens(client):
    texts = [choice.text for choice in complete(client, ["One, two,", "The capital of France is"]).choices]
    assert texts[1] == complete(client).choices[0].text
    tokens = complete(client, "One, two,", extra_body={"return_token_ids": True}).choices[0].prompt_token_ids
    assert complete(client, [tokens, tokens]).choices[1].text == texts[0]


def test_a_stop_string_ends_the_text_before_it(client):
    whole = complete(client, "1, 2, 3, 4,", max_tokens=20).choices[0].text
    assert " 7" in whole
    choice = complete(client, "1, 2, 3, 4,", max_tokens=20, stop=[" 7"]).choices[0]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", " 7")
    assert choice.text == whole[: whole.index(" 7")]


def test_logprobs_of_completions(client):
    choice = complete(client, logprobs=3).choices[0]
    report = choice.logprobs
    assert "".join(report.tokens) == choice.text
    assert len(report.token_logprobs) == 8
    for token, logprob, top in zip(report.tokens, report.token_logprobs, report.top_logprobs, strict=True):
        assert len(top) == 3
        assert top[token] == logprob == max(top.values())  # greedy
    assert report.text_offset == [len("".join(report.tokens[:i])) for i in range(8)]


def test_logprobs_of_chat_stream(client):
    whole = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    streamed = [
        entry
        for chunk in chat(client, logprobs=True, top_logprobs=2, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in whole]
    assert all(len(entry.top_logprobs) == 2 for entry in streamed)
    assert all(bytes(entry.bytes).decode() == entry.token for entry in streamed)


def test_a_beginning_that_was_sent_before_is_found(server, client):
    text = "The quick brown fox jumps over the lazy dog. " * 8
    before = metric(server, "prefix_cache_queries_total"), metric(server, "prefix_cache_hits_total")
    answers = [complete(client, text + word, extra_body={"cache_salt": salt} if salt else None)
               for word, salt in (("One", None), ("Two", None), ("Two", None), ("Two", "mine"))]  # fmt: skip
    prompt = answers[0].usage.prompt_tokens
    cached = [answer.usage.prompt_tokens_details.cached_tokens for answer in answers]
    full = (prompt - 1) // 16 * 16
    assert cached[0] == 0 and cached[1:] == [full, full, 0]
    assert answers[1].choices[0].text == answers[2].choices[0].text == answers[3].choices[0].text
    assert metric(server, "prefix_cache_queries_total") - before[0] == 4 * prompt
    assert metric(server, "prefix_cache_hits_total") - before[1] == sum(cached)


def test_a_priority_is_refused_unless_the_server_schedules_by_it(client):
    with pytest.raises(openai.BadRequestError, match="--scheduling-policy priority"):
        complete(client, stream=True, extra_body={"priority": 1})


def test_echo(client):
    assert complete(client, echo=True).choices[0].text.startswith("The capital of France is")


def test_thirty_two_requests_at_once_get_what_one_alone_gets(server, client, eventually):
    prompts = [f"{number} plus {number} is" for number in range(8)]
    alone = [complete(client, prompt).choices[0].text for prompt in prompts]
    before = metric(server, "request_success_total")

    def streamed(number: int) -> str:
        return "".join(chunk.choices[0].text for chunk in complete(client, prompts[number % 8], stream=True))

    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(streamed, range(32)))
    assert together == alone * 4
    assert metric(server, "request_success_total") == before + 32
    eventually(lambda: is_idle(server))
    assert metric(server, "kv_cache_usage_perc") == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_request(server, eventually, stream):
    body = json.dumps({"prompt": "Once", "max_tokens": 500, "ignore_eos": True, "n": 3, "stream": stream}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    before = metric(server, "request_success_total")
    with socket.create_connection((host, int(port))) as connection:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        eventually(lambda: metric(server, "num_requests_running") == 3)
    eventually(lambda: is_idle(server), 5)
    assert metric(server, "kv_cache_usage_perc") == 0
    text = httpx.get(f"{server.url}/metrics").text
    aborted = [line for line in text.splitlines() if "request_success_total" in line and "abort" in line]
    assert aborted
    assert metric(server, "request_success_total") == before + 3


def test_errors_that_the_client_knows(client):
    with pytest.raises(openai.NotFoundError, match="unknown model"):
        client.completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.BadRequestError, match=r"max_tokens asks for 600 more.* at most 512"):
        complete(client, max_tokens=600)
    with pytest.raises(openai.BadRequestError, match="the prompt has 1001 tokens"):
        complete(client, "a b" * 1000 + "a")
    with pytest.raises(openai.BadRequestError, match="did you mean 'top_k'"):
        complete(client, extra_body={"topk": 1})


def test_the_log_tells_of_requests_but_not_what_they_said(server, client, eventually):
    secret = complete(client, "My password is swordfish").id
    eventually(lambda: any(f"{secret} finished" in line for line in server.log))
    assert not any("swordfish" in line for line in server.log)


def test_the_api_process_has_no_torch(server):
    libraries = Path(f"/proc/{server.process.pid}/maps")
    if not libraries.exists():
        pytest.skip("needs /proc")
    assert "libtorch" not in libraries.read_text()
    (engine,) = psutil.Process(server.process.pid).children()
    assert "libtorch" in Path(f"/proc/{engine.pid}/maps").read_text()
