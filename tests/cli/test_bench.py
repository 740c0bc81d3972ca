"""`llmopt bench` as users call it."""

import asyncio
import json
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from aiohttp import web

from llmopt.backend.kv_cache import CACHE_DTYPES, KVCache
from llmopt.cli.main import main


def llmopt(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Run the command line in this process; its exit status."""
    monkeypatch.setattr("sys.argv", ["llmopt", *map(str, words)])
    with pytest.raises(SystemExit) as exit:
        main()
    return int(exit.value.code or 0)


async def stream(asked: list[dict], request: web.Request) -> web.StreamResponse:
    """Three tokens and no more; prompts of model `broken` fail unless they are the first."""
    body = await request.json()
    asked.append(body)
    if body["model"] == "broken" and len(asked) > 1:
        return web.Response(status=500, text="boom")
    response = web.StreamResponse()
    await response.prepare(request)
    for tokens in (1, 2, 3):
        usage = {"prompt_tokens": 4, "completion_tokens": tokens}
        choice = {"text": "x", "finish_reason": "length" if tokens == 3 else None}
        await response.write(f"data: {json.dumps({'choices': [choice], 'usage': usage})}\n\n".encode())
    await response.write(b"data: [DONE]\n\n")
    return response


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict]]]:
    """A server in a thread of its own: its address, and the bodies it was sent."""
    asked: list[dict] = []
    app = web.Application()
    app.router.add_post("/v1/completions", partial(stream, asked))
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    loop.run_until_complete(runner.setup())
    loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", 0).start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}", asked
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


def test_a_server_is_measured_with_the_prompts_that_were_asked_for(server, monkeypatch, tmp_path, tiny_model, capsys):
    url, asked = server
    out = tmp_path / "bench.json"
    status = llmopt(
        monkeypatch, "bench", "--base-url", url, "--model", "m", "--tokenizer", tiny_model("llama")[0], "--json", out,
        "--input-len", 9, "--output-len", 3, "--num-prompts", 6, "--max-concurrency", 2,
        "--goodput", "ttft:60000,tpot:60000", "--num-gpus", 2,
    )  # fmt: skip
    assert status == 0
    result = json.loads(out.read_text())
    assert result["requests"] == {"total": 6, "ok": 6, "failed": 0}
    assert result["output_tokens"] == 18 and result["goodput"] > 0
    assert set(result["ttft_ms"]) == set(result["itl_ms"]) == set(result["e2e_ms"]) == {"mean", "p50", "p90", "p99"}
    assert [len(body["prompt"]) for body in asked] == [9] * 7
    assert len({tuple(body["prompt"]) for body in asked}) == 7
    shown = capsys.readouterr().out
    assert "6 of 6 requests answered" in shown and "lower is better" in " ".join(shown.split())


def test_json_alone_goes_to_standard_output(server, monkeypatch, capsys):
    url, _ = server
    assert llmopt(monkeypatch, "bench", "--base-url", url, "--model", "m", "--num-prompts", 2, "--json", "-") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["version"] == 1
    assert "requests answered" in shown.err


def test_a_server_that_fails_every_request_could_not_be_measured(server, monkeypatch, capsys):
    assert llmopt(monkeypatch, "bench", "--base-url", server[0], "--model", "broken", "--num-prompts", 3) == 3
    assert "all 3 requests failed, 3 of them with: HTTP 500: boom" in capsys.readouterr().err


def test_a_grid_in_this_process(monkeypatch, tmp_path, tiny_model):
    out = tmp_path / "bench.json"
    folder = tiny_model("llama")[0]
    words = ("-p", "4,8", "-p", 12, "-n", "1,3", "-b", 2, "--repeats", 1, "--backend", "reference", "--json", out)
    assert llmopt(monkeypatch, "bench", folder, *words) == 0
    runs = json.loads(out.read_text())["runs"]
    assert [(run["prompt_len"], run["gen_len"]) for run in runs if run["phase"] == "prefill"] == [
        (4, 1), (4, 3), (8, 1), (8, 3), (12, 1), (12, 3),
    ]  # fmt: skip
    assert sum(run["phase"] == "decode" for run in runs) == 3


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_the_cache_is_of_the_kind_that_was_asked_for(kind, monkeypatch, tmp_path, tiny_model):
    made = []
    allocate = KVCache.allocate
    monkeypatch.setattr(KVCache, "allocate", lambda *shape: made.append(allocate(*shape)) or made[-1])
    words = ("-p", "4", "-n", "2", "--repeats", 1, "--backend", "reference", "--kv-cache-dtype", kind)
    assert llmopt(monkeypatch, "bench", tiny_model("llama")[0], *words) == 0
    assert [cache.keys.dtype for cache in made] == [CACHE_DTYPES[kind]] * 3


@pytest.fixture
def quick_machine(monkeypatch):
    """A look at the machine that takes no time."""
    monkeypatch.setattr("llmopt.bench.machine.PROBE_BYTES", 1 << 20)
    monkeypatch.setattr("llmopt.bench.machine.PROBE_SIZE", 64)
    monkeypatch.setattr("llmopt.bench.machine.PROBE_SECONDS", 0.0)


LOAD = ("--num-prompts", 5, "--input-len", 12, "--output-len", 4, "--backend", "reference")


def test_a_load_in_this_process(monkeypatch, tmp_path, tiny_model, capsys, quick_machine):
    out = tmp_path / "bench.json"
    words = ("--request-rate", 200, "--batching", "static", "--goodput", "ttft:60000", *LOAD, "--json", out)
    assert llmopt(monkeypatch, "bench", tiny_model("llama")[0], *words) == 0
    result = json.loads(out.read_text())
    assert result["requests"] == {"total": 5, "ok": 5, "failed": 0}
    assert (result["output_tokens"], result["engine"]["batching"], result["request_rate"]) == (20, "static", 200.0)
    assert "5 of 5 requests answered" in capsys.readouterr().out


def test_an_ablation(monkeypatch, tmp_path, tiny_model, capsys, quick_machine):
    monkeypatch.setenv("COLUMNS", "100")
    out = tmp_path / "bench.json"
    assert llmopt(monkeypatch, "bench", tiny_model("llama")[0], "--ablate", "--repeats", 1, *LOAD, "--json", out) == 0
    result = json.loads(out.read_text())
    assert result["request_rate"] > 0
    names = [row["name"] for row in result["rows"]]
    assert names[0] == "all on" and result["rows"][0]["of_all_on"] == 1
    shown = capsys.readouterr().out
    assert all(name in shown for name in names) and max(map(len, shown.splitlines())) <= 100


def test_a_profile(monkeypatch, tmp_path, tiny_model, capsys, quick_machine):
    out = tmp_path / "bench.json"
    words = ("--profile", "-b", 3, "-p", 9, "-n", 8, "--backend", "reference", "--json", out)
    assert llmopt(monkeypatch, "bench", tiny_model("llama")[0], *words) == 0
    result = json.loads(out.read_text())
    assert (result["batch"], result["prompt_len"], result["gen_len"]) == (3, 9, 8)
    assert "of the memory's limit" in capsys.readouterr().out


def test_a_stall(monkeypatch, tmp_path, tiny_model, capsys, quick_machine):
    out = tmp_path / "bench.json"
    words = ("--stall", "-b", 2, "-p", 40, "--repeats", 1, "--chunked-prefill-size", 8, "--backend", "reference")
    assert llmopt(monkeypatch, "bench", tiny_model("llama")[0], *words, "--json", out) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["name"], row["steps"]["median"]) for row in rows] == [("chunked", 5), ("in one piece", 1)]
    assert "worst gap" in capsys.readouterr().out


URL = ("--base-url", "http://127.0.0.1:1", "--model", "m")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give either MODEL"),
        (("smollm2", *URL), "give either MODEL"),
        (("--base-url", "http://127.0.0.1:1"), "--model NAME"),
        (("smollm2", "--input-len", "4"), "--input-len only goes with --request-rate or --ablate or --base-url"),
        (("smollm2", "--static"), "No such option"),
        (("smollm2", "--ablate", "--profile"), "--ablate and --profile are measured one at a time"),
        (("smollm2", "--ablate", "-p", "4"), "--prompt-len only goes with"),
        (("smollm2", "--profile", "-b", "1,2"), "--batch takes one number"),
        (("smollm2", "--batching", "static"), "--batching only goes with --request-rate or --ablate"),
        (("smollm2", "--request-rate", "0"), "--request-rate must be above 0"),
        (("smollm2", "--request-rate", "1", "--batching-window", "3"), "needs --batching dynamic"),
        (("smollm2", "--request-rate", "1", "--random-range-ratio", "1"), "--random-range-ratio must be"),
        ((*URL, "--stall"), "--stall only goes with"),
        (("smollm2", "--no-ignore-eos"), "--ignore-eos only goes with --base-url"),
        ((*URL, "-p", "4"), "--prompt-len only goes with MODEL"),
        ((*URL, "--threads", "1"), "--threads only goes with MODEL"),
        ((*URL, "--goodput", "itl:3"), "--goodput itl:3 is not"),
        ((*URL, "--request-rate", "0"), "--request-rate must be above 0"),
        ((*URL, "--timeout", "0"), "--timeout must be above 0"),
        (("smollm2", "-b", "1,x"), "--batch takes whole numbers"),
        (("smollm2", "-n", "0"), "--gen-len needs numbers of at least 1"),
        (("/no/such/model",), "there is no model at"),
        (("smollm2", "--backend", "gpu"), "'gpu' is not one of 'auto', 'reference'"),
    ],
)
def test_wrong_usage_is_refused_in_words(words, message, monkeypatch, capsys):
    assert llmopt(monkeypatch, "bench", *words) == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in shown and "Traceback" not in shown


def test_a_key_from_the_environment_is_no_conflict_with_a_model_here(monkeypatch, tiny_model, tmp_path):
    monkeypatch.setenv("LLMOPT_API_KEY", "secret")
    words = ("-p", 4, "-n", 1, "--repeats", 1, "--backend", "reference", "--json", tmp_path / "x.json")
    assert llmopt(monkeypatch, "bench", Path(tiny_model("llama")[0]), *words) == 0
    assert "secret" not in (tmp_path / "x.json").read_text()
