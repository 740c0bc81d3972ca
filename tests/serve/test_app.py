"""The routes over a scripted client, in this process."""

import asyncio
import json
from dataclasses import fields

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import structs

from llmopt import __version__
from llmopt.engine.outputs import EngineStats, SpeculationStats
from llmopt.errors import InputError
from llmopt.serve import gate as gate_module
from llmopt.serve.app import FIELDS, create_app
from llmopt.serve.errors import EngineStopped
from llmopt.serve.gate import Gate
from llmopt.serve.metrics import Metrics

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


class Api:
    """The application, asked without a network; httpx is the openai client's own HTTP client."""

    def __init__(self, model, client, api_key=None):
        self.app = create_app(model, client, Metrics("m"))
        self.api_key = api_key
        self.closing = False

    def __call__(self, method, path, **arguments) -> httpx.Response:
        async def ask():
            gate = Gate(self.app, self.api_key)
            gate.closing = self.closing
            transport = httpx.ASGITransport(gate, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
                response = await http.request(method, path, **arguments)
            assert gate.idle.is_set()
            return response

        return asyncio.run(ask())


@pytest.fixture
def api(served_model, scripted_client) -> Api:
    return Api(served_model, scripted_client)


def error_of(response: httpx.Response) -> dict:
    assert set(response.json()) == {"error"}
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    return response.json()["error"]


def events_of(response: httpx.Response) -> list:
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [event.removeprefix("data: ") for event in response.text.split("\n\n") if event]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def test_a_completion(api):
    response = api("POST", "/v1/completions", json={"model": "alias", "prompt": "abc", "max_tokens": 5})
    assert response.status_code == 200
    body = response.json()
    assert (body["model"], body["object"], body["choices"][0]["text"]) == ("alias", "text_completion", "hello")
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (3, 5)
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


@pytest.mark.parametrize("stream", [True, False])
def test_priority_and_salt_reach_the_engine(api, served_model, scripted_client, stream):
    object.__setattr__(served_model, "ready", structs.replace(served_model.ready, scheduling_policy="priority"))
    body = {**CHAT, "stream": stream, "priority": -3, "cache_salt": "mine"}
    assert api("POST", "/v1/chat/completions", json=body).status_code == 200
    assert api("POST", "/v1/chat/completions", json={**CHAT, "stream": stream}).status_code == 200
    assert scripted_client.placed == [(-3, "mine"), (0, None)]


def test_a_streamed_chat(api):
    response = api("POST", "/v1/chat/completions", json={**CHAT, "stream": True, "n": 2})
    chunks = events_of(response)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    texts = ["", ""]
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"].get("content", "")
    assert texts == ["hello", "hello"]


def test_text_is_the_same_streamed_or_not(api):
    body = {"prompt": "abc", "echo": True}
    whole = api("POST", "/v1/completions", json=body).json()["choices"][0]["text"]
    chunks = events_of(api("POST", "/v1/completions", json={**body, "stream": True}))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole == "abchello"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "the body is not valid JSON: "),
        (b"", "the body must be a JSON object"),
        (b"[1]", "the body must be a JSON object"),
        (b"null", "the body must be a JSON object"),
        (b"\xff", "There was an error parsing the body"),
        (b"[" * 100_000, "There was an error parsing the body"),
    ],
)
def test_bodies_that_are_no_json_object(api, content, message):
    response = api("POST", "/v1/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert error_of(response)["message"].startswith(message)


def test_a_form_is_told_what_to_send(api):
    response = api("POST", "/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert response.status_code == 400
    assert "Content-Type: application/json" in error_of(response)["message"]


@pytest.mark.parametrize(
    ("path", "body", "status", "message", "param"),
    [
        ("/v1/completions", {"prompt": "a", "temprature": 1}, 400, "did you mean 'temperature'?", "temprature"),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, 400, "suffix is not supported", "suffix"),
        ("/v1/completions", {"prompt": "a", "top_p": 2}, 400, "top_p must be between 0 and 1", None),
        ("/v1/completions", {"prompt": "x" * 200}, 400, "the prompt has 200 tokens", None),
        ("/v1/completions", {"prompt": "a", "model": "smal"}, 404, "did you mean 'small'? (served: small, a", "model"),
        ("/v1/chat/completions", {"prompt": "a"}, 400, "messages is missing", "messages"),
        ("/v1/chat/completions", {**CHAT, "chat_template_kwargs": {"tokenize": True}}, 400, "'tokenize'",
         "chat_template_kwargs"),
    ],
)  # fmt: skip
def test_wrong_requests(api, path, body, status, message, param):
    response = api("POST", path, json=body)
    assert response.status_code == status
    error = error_of(response)
    assert message in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


texts = st.text(max_size=5) | st.just("\ud800")
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 70) | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "x"]), "content": json_values}), max_size=3
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_body_is_answered_with_an_internal_error(api, data):
    path = data.draw(st.sampled_from(sorted(FIELDS)))
    required = {"prompt": st.just("a") | json_values} if path == "/v1/completions" else {"messages": messages}
    names = st.sampled_from(sorted(set(FIELDS[path]) - {"prompt", "messages"})) | st.text(max_size=3)
    body = data.draw(st.fixed_dictionaries(required)) | data.draw(st.dictionaries(names, json_values, max_size=3))
    response = api("POST", path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404)
    if response.status_code != 200:
        assert "\n" not in error_of(response)["message"]


def test_wrong_paths_and_methods(api):
    assert error_of(api("GET", "/v1/embeddings"))["message"] == "there is nothing at /v1/embeddings"
    response = api("GET", "/v1/completions")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert error_of(response)["message"] == "/v1/completions does not take GET"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "status"), [(EngineStopped("the engine died"), 500), (InputError("too long"), 400)])
def test_errors_under_way(api, scripted_client, stream, error, status):
    scripted_client.error = error
    response = api("POST", "/v1/completions", json={"prompt": "a", "stream": stream})
    if stream:
        assert response.status_code == 200
        last = events_of(response)[-1]["error"]
        assert (last["message"], last["code"]) == (str(error), status)
    else:
        assert response.status_code == status
        assert error_of(response)["message"] == str(error)


def test_a_bug_is_an_internal_error_without_details(api, scripted_client):
    scripted_client.generate = None
    response = api("POST", "/v1/completions", json={"prompt": "a"})
    assert response.status_code == 500
    assert error_of(response)["message"] == "internal error; the server's log says more"


@pytest.mark.parametrize("stream", [False, True])
def test_without_an_engine_there_is_503(api, scripted_client, stream):
    scripted_client.down = "the engine died"
    response = api("POST", "/v1/completions", json={"prompt": "a", "stream": stream})
    assert response.status_code == 503
    assert error_of(response)["message"] == "the engine died"


def test_health(api, scripted_client):
    assert api("GET", "/health").status_code == 200
    scripted_client.down = "the engine died"
    response = api("GET", "/health")
    assert (response.status_code, error_of(response)["message"]) == (503, "the engine died")


def test_models_and_version(api):
    models = api("GET", "/v1/models").json()
    assert [(model["id"], model["max_model_len"]) for model in models["data"]] == [("small", 100), ("alias", 100)]
    assert api("GET", "/v1/models/alias").json()["id"] == "alias"
    assert error_of(api("GET", "/v1/models/org/other"))["code"] == "model_not_found"
    assert api("GET", "/version").json() == {"version": __version__}


def test_metrics_have_vllms_names(api):
    text = api("GET", "/metrics").text
    assert 'vllm:num_requests_running{engine="0",model_name="m"} 0.0' in text
    assert "vllm:e2e_request_latency_seconds_bucket" in text


def test_metrics_of_speculation():
    metrics = Metrics("m")
    state = {field.name: 1 for field in fields(EngineStats) if field.name != "speculation"}
    for drafts in (SpeculationStats(2, 8, 5, [2, 2, 1]), None, SpeculationStats(3, 12, 6, [3, 2, 1])):
        metrics.update(EngineStats(**state, speculation=drafts))
    text = metrics.render().decode()
    for name, value in (("drafts", 3), ("draft_tokens", 12), ("accepted_tokens", 6)):
        assert f'vllm:spec_decode_num_{name}_total{{engine="0",model_name="m"}} {value}.0' in text
    for place, value in enumerate((3, 2, 1)):
        labels = f'engine="0",model_name="m",position="{place}"'
        assert f"vllm:spec_decode_num_accepted_tokens_per_pos_total{{{labels}}} {value}.0" in text


@pytest.mark.parametrize("header", [None, "Bearer wrong", "sesame", "Basic sesame", "Bearer sesamé"])
def test_a_key_protects_the_api_but_not_health(served_model, scripted_client, header):
    api = Api(served_model, scripted_client, "sesame")
    headers = {} if header is None else {"authorization": header.encode()}
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/v1/none")):
        response = api(method, path, headers=headers)
        assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key")
    assert api("GET", "/health", headers=headers).status_code == 200
    assert api("GET", "/v1/models", headers={"authorization": "Bearer sesame"}).status_code == 200


def test_while_closing_new_requests_get_503(api):
    api.closing = True
    for path in ("/v1/models", "/health"):
        response = api("GET", path)
        assert (response.status_code, error_of(response)["message"]) == (503, "the server is shutting down")
    assert api("GET", "/metrics").status_code == 200


def test_large_bodies_are_refused(api, monkeypatch):
    monkeypatch.setattr(gate_module, "MAX_BODY_BYTES", 100)

    async def pieces():
        for _ in range(20):
            yield b" " * 10

    headers = {"content-type": "application/json"}
    for content in (b" " * 200, pieces()):
        response = api("POST", "/v1/completions", content=content, headers=headers)
        assert response.status_code == 413
        assert "the body is larger than" in error_of(response)["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_ends_its_request(served_model, scripted_client, stream):
    scripted_client.hang = True
    app = create_app(served_model, scripted_client, Metrics("m"))
    body = json.dumps({"prompt": "a", "stream": stream}).encode()
    scope = {
        "type": "http", "asgi": {"spec_version": "2.3"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"", "root_path": "",
        "headers": [(b"content-type", b"application/json")], "client": ("x", 1), "server": ("x", 1),
    }  # fmt: skip

    async def scenario():
        incoming = asyncio.Queue()
        incoming.put_nowait({"type": "http.request", "body": body, "more_body": False})

        async def send(message):
            pass

        gate = Gate(app, None)
        request = asyncio.create_task(gate(scope, incoming.get, send))
        async with asyncio.timeout(5):
            while not scripted_client.seen:
                await asyncio.sleep(0.01)
            assert not gate.idle.is_set()
            incoming.put_nowait({"type": "http.disconnect"})
            await request
        assert gate.idle.is_set()
        assert scripted_client.closed == 1

    asyncio.run(scenario())
