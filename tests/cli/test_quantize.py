"""`llmopt quantize` as a user meets it: recipes, gates, several artifacts, plans."""

import inspect
import json
import re
from pathlib import Path

import pytest

from llmopt.cli import quantize as command
from llmopt.cli.main import main
from llmopt.evaluate.gates import make_gates
from llmopt.model.source import open_source
from llmopt.quant.options import Options
from llmopt.quant.recipe import resolve
from llmopt.quant.recipe_file import read_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
FLAGS = ["--samples", "4", "--seq-len", "64", "--calibration", "builtin"]


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*words) runs the command line in this process; gives the exit status and both outputs."""

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["llmopt", "quantize", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


def output_of(recipe: Path, folder: Path) -> str:
    return str(folder / ("out.gguf" if "llama-cpp" in recipe.name else "out"))


def test_there_is_a_recipe_for_each_target() -> None:
    names = [recipe.stem for recipe in RECIPES]
    assert names == ["cpu-engine", "llama-cpp-laptop", "safest", "smallest", "vllm-gpu"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral-window", "llama-tied-biased"])
def test_every_recipe_suits_every_family(family: str, recipe: Path, tiny_model, tmp_path: Path) -> None:
    source = open_source(str(tiny_model(family)[0]))
    read = read_recipe(recipe)
    options = read.options("model", output_of(recipe, tmp_path), {"seq_len": 64})
    assert resolve(options, source.config).schemes
    assert make_gates(read.gate.inline(), recipe.name).need_reference
    assert f"recipes/{recipe.name}" in recipe.read_text()


@pytest.mark.model
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_suits_a_real_model(recipe: Path, smollm2: str, tmp_path: Path) -> None:
    source = open_source(smollm2)
    options = read_recipe(recipe).options(smollm2, output_of(recipe, tmp_path), {})
    assert len(resolve(options, source.config).schemes) == 210


def test_a_recipe_runs_whole_with_its_gate(run, tiny_model, tmp_path: Path) -> None:
    folder, _ = tiny_model("llama")
    recipe = str(RECIPES[2])
    words = [str(folder), "--recipe", recipe, "-o", str(tmp_path / "out"), "--json", str(tmp_path / "result.json")]
    status, out, error = run(*words)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (status, error) == (0, "")
    assert [gate["verdict"] for gate in result["gates"]] == ["pass"] * 3
    assert result["gates"][0]["output"] == result["output"] == str(tmp_path / "out")
    assert (result["scheme"], result["format"], result["version"]) == ("w8a16", "compressed-tensors", 1)
    assert "pass: mean KL: divergence.mean_kl is " in out
    assert open_source(str(tmp_path / "out")).config.num_layers == 3


GATED = """\
method: rtn
group_size: 32
exports:
  - {output: OUT/a, format: gptq}
  - {output: OUT/b, format: compressed-tensors}
gate:
  ctx: 64
  windows: WINDOWS
  gates:
    - {name: divergence, metric: divergence.mean_kl, max: BOUND}
"""


@pytest.mark.parametrize(("bound", "windows", "expected"), [("9", "2", 0), ("0.000001", "4", 1), ("9", "1", 4)])
def test_the_gate_decides_the_exit_status_for_every_artifact(
    bound: str, windows: str, expected: int, run, tiny_model, tmp_path: Path
) -> None:
    text = GATED.replace("OUT", str(tmp_path)).replace("BOUND", bound).replace("WINDOWS", windows)
    (tmp_path / "recipe.yaml").write_text(text)
    status, out, error = run(str(tiny_model("llama")[0]), "--recipe", str(tmp_path / "recipe.yaml"), "--json", "-")
    result = json.loads(out)
    assert status == expected
    assert [export["output"] for export in result["exports"]] == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert [export["format"] for export in result["exports"]] == ["gptq", "compressed-tensors"]
    assert [gate["output"] for gate in result["gates"]] == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert result["output"] == str(tmp_path / "a")
    assert all((tmp_path / name / "llmopt.json").exists() for name in "ab")  # whatever the verdict
    assert error.count("divergence: divergence.mean_kl is") == 2


def test_a_gate_that_cannot_be_read_or_measured_stops_the_run_before_it_begins(run, tiny_model, tmp_path: Path) -> None:
    folder, recipe = str(tiny_model("llama")[0]), tmp_path / "recipe.yaml"
    text = GATED.replace("OUT", str(tmp_path)).replace("BOUND", "1")
    for wrong, says in (
        (text.replace("mean_kl", "mean_k").replace("WINDOWS", "2"), "divergence.mean_kl"),
        (text.replace("WINDOWS", "100000"), "not for 100000"),
        (text.replace("ctx: 64", "text: nowhere.txt").replace("WINDOWS", "2"), "nowhere.txt cannot be read"),
    ):
        recipe.write_text(wrong)
        status, _, error = run(folder, "--recipe", str(recipe))
        assert (status, error.count("\n")) == (2, 1)
        assert says in error
        assert list(tmp_path.iterdir()) == [recipe]


def test_a_dry_run_shows_the_plan_and_writes_nothing(run, tiny_model, tmp_path: Path) -> None:
    words = [str(tiny_model("llama")[0]), "-o", str(tmp_path / "out"), *FLAGS]
    status, out, _ = run(*words, "--dry-run")
    assert status == 0
    for word in ("21 in w4a16", "4 samples of 64 tokens of builtin", "gptq", "memory, about", "time, about", "NaN"):
        assert word in out
    status, out, _ = run(*words, "--dry-run", "--json", "-")
    plan = json.loads(out)
    assert plan["exports"][0]["output"] == str(tmp_path / "out")
    assert plan["seconds"] == pytest.approx(sum(plan["phases"].values()), abs=0.5)
    assert plan["memory_bytes"] == sum(plan["memory"].values())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "give MODEL, or a --recipe that says it"),
        (["MODEL"], "give --output, or a --recipe"),
        (["MODEL", "-o", "OUT", "--method", "rtn", "--samples", "4"], "--samples only goes with --calibration or"),
        (["MODEL", "-o", "OUT", "--method", "rtn", "--resume"], "--resume only goes with --calibration or"),
        (["MODEL", "-o", "OUT", "--method", "awq", "--damp", "0.1"], "--damp only goes with --method gptq"),
        (["MODEL", "-o", "OUT", "--quantizer", "gptqmodel"], "quantizer: .*auto-gptq"),
        (["MODEL", "-o", "OUT", "--recipe", "RECIPE"], "RECIPE: damp only goes with --method gptq"),
        (["MODEL", "-o", "OUT", "--recipe", "/nowhere.yaml"], "/nowhere.yaml cannot be read"),
    ],
)
def test_what_would_do_nothing_is_refused(words: list[str], says: str, run, tiny_model, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("method: rtn\ndamp: 0.1\n")
    places = {
        "MODEL": str(tiny_model("llama")[0]),
        "OUT": str(tmp_path / "out"),
        "RECIPE": str(tmp_path / "recipe.yaml"),
    }
    status, _, error = run(*(places.get(word, word) for word in words))
    assert (status, error.count("\n")) == (2, 1)
    assert re.search(says.replace("RECIPE", places["RECIPE"]), error)
    assert not (tmp_path / "out").exists()


def test_what_a_flag_made_idle_in_a_recipe_is_no_mistake(run, tiny_model, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("method: gptq\ndamp: 0.1\ngroup_size: 32\n")
    words = ["--recipe", str(tmp_path / "recipe.yaml"), "--method", "rtn", "-o", str(tmp_path / "out")]
    assert run(str(tiny_model("llama")[0]), *words)[0] == 0


def test_calibration_weighs_rounding_to_nearest(run, tiny_model, tmp_path: Path) -> None:
    words = [str(tiny_model("llama")[0]), "--method", "rtn", "--group-size", "32"]
    assert run(*words, "-o", str(tmp_path / "plain"))[0] == 0
    assert run(*words, "-o", str(tmp_path / "weighed"), *FLAGS)[0] == 0
    plain, weighed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "weighed"))
    assert plain != weighed


def test_flags_have_the_defaults_of_the_options() -> None:
    parameters = inspect.signature(command.quantize).parameters
    for key in set(command._KEYS) - {"format", "ignore"}:
        assert parameters[key].default == Options.model_fields[key].default, key


def test_seconds_by_phase_and_the_next_command_are_shown(run, tiny_model, tmp_path: Path) -> None:
    status, out, _ = run(str(tiny_model("llama")[0]), "-o", str(tmp_path / "out"), "--group-size", "32", *FLAGS)
    assert status == 0
    assert "relative error" in out and "self_attn.q_proj" in out
    assert f"--reference {tiny_model('llama')[0]}" in out.replace("\n", "")
    assert all(len(line) <= 100 for line in out.splitlines())
