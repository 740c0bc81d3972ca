"""How the server starts and ends, as a process, with a small random model that can go on for ever."""

import json
import shutil
import signal
import socket
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import psutil
import pytest

ENDLESS = {"prompt": "the cat", "max_tokens": 8000, "ignore_eos": True, "stream": True}
CALM = ("--port", "0", "--threads", "1", "--backend", "reference", "--max-model-len", "8192")


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory) -> str:
    """A folder with a model that takes long texts."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    shutil.copytree(tiny_model("llama")[0], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16384}))
    return str(folder)


@contextmanager
def endless_stream(server):
    """The lines of a stream that has begun and does not end by itself for a long time."""
    with httpx.stream("POST", f"{server.url}/v1/completions", json=ENDLESS, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        yield lines


def last_event(lines) -> dict:
    *_, last, done = [line for line in lines if line]
    assert done == "data: [DONE]"
    return json.loads(last.removeprefix("data: "))


def engine_of(server) -> psutil.Process:
    (engine,) = psutil.Process(server.process.pid).children()
    return engine


def test_a_signal_lets_streams_finish_and_refuses_new_requests(model, running_server, eventually):
    with running_server(model, *CALM, LLMOPT_API_KEY="sesame") as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="sesame", max_retries=0) as client:
            stream = client.completions.create(
                model=model, prompt="the cat", stream=True, max_tokens=500, extra_body={"ignore_eos": True}
            )
            next(iter(stream))
            server.process.send_signal(signal.SIGTERM)
            eventually(lambda: any("stopping" in line for line in server.log))
            with pytest.raises(openai.InternalServerError, match="shutting down"):
                client.models.list()
            assert list(stream)[-1].choices[0].finish_reason == "length"
        assert server.wait() == 0
        assert not any("sesame" in line for line in server.log)


def test_requests_that_take_too_long_to_finish_end_with_an_error(model, running_server):
    with running_server(model, *CALM, "--shutdown-timeout", "0.5") as server, endless_stream(server) as lines:
        server.process.send_signal(signal.SIGTERM)
        assert last_event(lines)["error"]["message"] == "the server has shut down"
        assert server.wait() == 0


def test_a_second_signal_ends_at_once(model, running_server):
    with running_server(model, *CALM) as server, endless_stream(server) as lines:
        for _ in range(2):
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        assert last_event(lines)["error"]["message"] == "the server has shut down"
        assert server.wait(10) == 128 + signal.SIGINT


def test_when_the_engine_dies_clients_are_told_and_the_server_ends(model, running_server):
    with running_server(model, *CALM) as server, endless_stream(server) as lines:
        engine_of(server).kill()
        assert last_event(lines)["error"]["code"] == 500
        assert server.wait() == 3
        assert server.log[-1] == "llmopt: error: the engine process has ended unexpectedly (killed by SIGKILL)\n"


def test_the_engine_does_not_outlive_the_server(model, running_server):
    with running_server(model, *CALM) as server:
        assert server.url
        engine = engine_of(server)
        server.process.kill()
        engine.wait(10)  # raises TimeoutExpired if it lives on


def test_the_api_process_has_no_torch(model, running_server):
    with running_server(model, *CALM) as server:
        assert server.url
        libraries = Path(f"/proc/{server.process.pid}/maps")
        if not libraries.exists():
            pytest.skip("needs /proc")
        assert "libtorch" not in libraries.read_text()
        assert "libtorch" in Path(f"/proc/{engine_of(server).pid}/maps").read_text()


def test_a_port_in_use_is_told_before_the_model_is_loaded(running_server):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with running_server("no-such-model", "--port", port) as server:
            assert server.wait() == 2
            assert server.log == [f"llmopt: error: port {port} is in use; choose another with --port\n"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int3"], "dtype must be one of auto, float32, bfloat16, float16, not 'int3'"),
        (["--port", "70000"], "port must be between 0 and 65535, not 70000"),
        (["--host", "no.such.host.invalid"], "the host 'no.such.host.invalid' is not known"),
        (["--chat-template", "no.jinja"], "cannot read the chat template no.jinja"),
        (["--max-model-len", "99999"], "max_model_len 99999 is more than the 16384 tokens"),
        (["--log-level", "loud"], "log_level must be one of debug, info, warning, error, not 'loud'"),
        (["--shutdown-timeout", "-1"], "shutdown_timeout must be at least 0 seconds, not -1.0"),
    ],
)
def test_what_cannot_start_says_why_in_one_line(model, running_server, arguments, message):
    with running_server(model, *CALM, *arguments) as server:
        assert server.wait(60) == 2
        assert server.log[-1].startswith(f"llmopt: error: {message}")
        assert not any("Traceback" in line for line in server.log)


def test_a_model_that_is_not_there(running_server):
    with running_server("no-such-model", "--port", "0") as server:
        assert server.wait() == 2
        assert server.log == ["llmopt: error: there is no model at no-such-model: give a folder, a .gguf file, "
                              "a hub id or 'smollm2'\n"]  # fmt: skip
