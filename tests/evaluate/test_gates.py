from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmopt.errors import InputError
from llmopt.evaluate.gates import Gate, exit_status, read_gates
from llmopt.evaluate.junit import write_junit

DEMO = Path(__file__).parents[2] / "recipes" / "gates" / "demo.yaml"


def write(folder: Path, text: str) -> Path:
    file = folder / "gates.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((0.1, 0.2), "pass"),
        ((0.1, 0.3), "pass"),
        ((0.2, 0.4), "inconclusive"),
        ((0.31, 0.4), "fail"),
        (None, "inconclusive"),
    ],
)
def test_the_whole_interval_decides_on_a_maximum(interval, verdict):
    assert Gate(name="g", metric="divergence.mean_kl", max=0.3).verdict(interval) == verdict


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((0.7, 0.8), "pass"),
        ((0.65, 0.8), "pass"),
        ((0.6, 0.7), "inconclusive"),
        ((0.5, 0.64), "fail"),
        (None, "inconclusive"),
    ],
)
def test_the_whole_interval_decides_on_a_minimum(interval, verdict):
    assert Gate(name="g", metric="divergence.top1", min=0.65).verdict(interval) == verdict


@given(st.floats(-10, 10), st.floats(-10, 10), st.floats(-10, 10))
def test_a_minimum_is_a_maximum_seen_from_below(a, b, bound):
    low, high = sorted((a, b))
    above = Gate(name="g", metric="divergence.top1", min=bound).verdict((low, high))
    below = Gate(name="g", metric="divergence.top1", max=-bound).verdict((-high, -low))
    assert above == below


def test_a_failure_outranks_what_is_uncertain():
    assert exit_status([]) == 0
    assert exit_status([{"verdict": "pass"}]) == 0
    assert exit_status([{"verdict": "pass"}, {"verdict": "inconclusive"}]) == 4
    assert exit_status([{"verdict": "inconclusive"}, {"verdict": "fail"}]) == 1


def test_the_recipe_for_the_demo_can_be_read():
    gates = read_gates(DEMO)
    assert gates.need_reference and gates.confidence == 0.95
    assert {gate.metric: gate.bound for gate in gates.gates}["divergence.mean_kl"] == 0.35


def test_perplexity_alone_needs_no_reference(tmp_path):
    gates = read_gates(write(tmp_path, "{version: 1, gates: [{name: a, metric: perplexity.value, max: 30}]}"))
    assert not gates.need_reference
    (verdict,) = gates.judge({"perplexity.value": 25.0}, {"perplexity.value": (24.0, 31.0)})
    assert verdict == {
        "name": "a", "metric": "perplexity.value", "verdict": "inconclusive", "value": 25.0, "bound": 30.0,
        "side": "max", "interval": (24.0, 31.0),
    }  # fmt: skip


GATE = "name: a, metric: perplexity.value, max: 3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gates: [", "is not YAML"),
        ("[]", "valid dictionary"),
        (f"{{gates: [{{{GATE}}}]}}", "version: Field required"),
        (f"{{version: 2, gates: [{{{GATE}}}]}}", "version: Input should be 1"),
        ("{version: 1, gates: []}", "gates: .*at least 1 item"),
        (f"{{version: 1, gate: [{{{GATE}}}], gates: [{{{GATE}}}]}}", "unknown key gate; did you mean gates"),
        (f"{{version: 1, gates: [{{{GATE}, mim: 2}}]}}", r"unknown key gates.0.mim; did you mean min\? known: name, "),
        ("{version: 1, gates: [{name: a, metric: divergence.mean_k, max: 1}]}", "did you mean divergence.mean_kl"),
        (f"{{version: 1, gates: [{{{GATE}, min: 1}}]}}", "gates.0: give either max or min"),
        ("{version: 1, gates: [{name: a, metric: perplexity.value}]}", "gates.0: give either max or min"),
        ("{version: 1, gates: [{name: a, metric: perplexity.value, max: .nan}]}", "gates.0.max: .*finite"),
        ('{version: 1, gates: [{name: a, metric: perplexity.value, max: "3"}]}', "gates.0.max: .*valid number"),
        (f"{{version: 1, confidence: 1.0, gates: [{{{GATE}}}]}}", "confidence: .*less than 1"),
        (f"{{version: 1, gates: [{{{GATE}}}, {{{GATE}}}]}}", "two gates named 'a'"),
        ("!!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line_that_says_where(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as raised:
        read_gates(write(tmp_path, text))
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_gates(tmp_path / "missing.yaml")


def test_junit_has_a_case_for_each_gate(tmp_path):
    common = {"metric": "divergence.mean_kl", "value": 0.2, "bound": 0.3, "side": "max", "interval": (0.1, 0.25)}
    verdicts = {"good & <fine>": "pass", "bad": "fail", "unsure": "inconclusive"}
    gates = [{"name": name, "verdict": verdict, **common} for name, verdict in verdicts.items()]
    write_junit({"model": "m", "gates": gates}, tmp_path / "out.xml")
    suite = ElementTree.parse(tmp_path / "out.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("3", "1", "1")
    assert {case.get("name"): [child.tag for child in case] for case in suite} == {
        "good & <fine>": [], "bad": ["failure"], "unsure": ["error"],
    }  # fmt: skip
    assert "0.1 to 0.25" in suite[1][0].get("message")
    with pytest.raises(InputError, match="cannot write"):
        write_junit({"model": "m", "gates": gates}, tmp_path / "missing" / "out.xml")
