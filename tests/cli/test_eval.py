"""`llmopt eval` as users call it."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from llmopt.cli.main import main


def llmopt(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Run the command line in this process; its exit status."""
    monkeypatch.setattr("sys.argv", ["llmopt", *map(str, words)])
    with pytest.raises(SystemExit) as exit:
        main()
    return int(exit.value.code or 0)


@pytest.fixture(scope="module")
def folder(tiny_model) -> Path:
    return tiny_model("llama")[0]


def gate_file(folder: Path, bound: str) -> Path:
    file = folder / "gates.yaml"
    file.write_text(f"{{version: 1, gates: [{{name: ppl, metric: perplexity.value, {bound}}}]}}")
    return file


SMALL = ("--ctx", 24, "--windows", 3, "--backend", "reference")


def test_the_result_is_shown_and_written(folder, monkeypatch, tmp_path, capsys):
    out = tmp_path / "eval.json"
    assert llmopt(monkeypatch, "eval", folder, "--reference", folder, *SMALL, "--json", out) == 0
    result = json.loads(out.read_text())
    assert {"version", "model", "reference", "perplexity", "divergence", "tasks", "gates"} <= set(result)
    assert set(result["perplexity"]) >= {"value", "reference"}
    assert set(result["divergence"]) == {"mean_kl", "p99_kl", "top1"}
    shown = capsys.readouterr().out
    assert "top-1 agreement" in shown and "3 windows of 24 tokens" in shown


def test_a_coarser_cache_is_measured(folder, monkeypatch, tmp_path):
    divergences = []
    for kind in ("float32", "int8", "fp8"):
        words = ("--reference", folder, *SMALL, "--kv-cache-dtype", kind, "--json", tmp_path / "eval.json")
        assert llmopt(monkeypatch, "eval", folder, *words) == 0
        divergences.append(json.loads((tmp_path / "eval.json").read_text())["divergence"]["mean_kl"])
    assert divergences[0] < 1e-9 < divergences[1] < divergences[2] < 0.1


def test_the_exit_status_follows_the_gates(folder, monkeypatch, tmp_path, capsys):
    out = tmp_path / "eval.json"
    assert llmopt(monkeypatch, "eval", folder, *SMALL, "--json", out) == 0
    low, high = json.loads(out.read_text())["intervals"]["perplexity.value"]
    bounds = {f"max: {high + 1}": 0, f"max: {low - 1}": 1, f"max: {(low + high) / 2}": 4, f"min: {high + 1}": 1}
    for bound, status in bounds.items():
        words = (*SMALL, "--gate", gate_file(tmp_path, bound), "--junit", tmp_path / "gates.xml")
        assert llmopt(monkeypatch, "eval", folder, *words) == status
        suite = ElementTree.parse(tmp_path / "gates.xml").getroot()
        assert (suite.get("failures"), suite.get("errors")) == (str(int(status == 1)), str(int(status == 4)))
    assert "inconclusive: ppl: perplexity.value is" in " ".join(capsys.readouterr().out.split())


def test_json_alone_goes_to_standard_output(folder, monkeypatch, capsys):
    assert llmopt(monkeypatch, "eval", folder, *SMALL, "--json", "-") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["version"] == 1 and "perplexity" in shown.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--junit", "x.xml"), "give --gate FILE.yaml as well"),
        (("--text", "/no/such/text"), "No such file"),
        (("--gate", "/no/such/gates"), "No such file"),
        (("--windows", "0"), "windows must be at least 1"),
        (("--ctx", "1"), "ctx must be at least 2"),
        (("--ctx", "24", "--windows", "999999"), "give fewer or shorter windows"),
        (("--device", "tpu"), "'tpu' is not one of 'auto', 'cpu', 'cuda'"),
    ],
)
def test_wrong_usage_is_refused_in_words(folder, words, message, monkeypatch, capsys):
    assert llmopt(monkeypatch, "eval", folder, *words) == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in shown and "Traceback" not in shown
