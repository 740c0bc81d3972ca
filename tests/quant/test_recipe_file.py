"""Recipes in YAML: what they say, what goes before it, and what is wrong with them in one line."""

from pathlib import Path

import pytest

from llmopt.errors import InputError
from llmopt.quant.options import Export, Options, Override
from llmopt.quant.recipe_file import read_recipe

WHOLE = """\
model: smollm2
method: gptq
scheme: w4a16
group_size: 64
ignore: [o_proj]
overrides:
  - modules: down_proj
    scheme: w8a16
exports:
  - output: out/one
    format: gptq
  - output: out/two
    format: compressed-tensors
gate:
  file: gates/demo.yaml
  text: text.txt
  windows: 4
"""


def recipe(folder: Path, text: str | bytes):
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_recipe(path)


def test_every_key_arrives(tmp_path: Path) -> None:
    read = recipe(tmp_path, WHOLE)
    assert read.options(None, None, {}) == Options(
        model="smollm2",
        method="gptq",
        scheme="w4a16",
        group_size=64,
        ignore=("o_proj",),
        overrides=(Override(modules="down_proj", scheme="w8a16"),),
        exports=(Export(output="out/one", format="gptq"), Export(output="out/two", format="compressed-tensors")),
    )
    assert read.gate is not None
    assert (read.gate.windows, read.gate.ctx) == (4, 1024)
    # What is to be read lies beside the recipe.
    assert (read.gate.file, read.gate.text) == (str(tmp_path / "gates/demo.yaml"), str(tmp_path / "text.txt"))


def test_the_command_line_goes_before_the_recipe(tmp_path: Path) -> None:
    options = recipe(tmp_path, WHOLE).options("other", "out/three", {"format": "awq", "scheme": "w3a16", "ignore": []})
    assert (options.model, options.scheme, options.ignore, options.group_size) == ("other", "w3a16", (), 64)
    assert options.exports[0] == Export(output="out/three", format="awq")
    assert options.exports[1] == Export(output="out/two", format="compressed-tensors")


def test_model_and_output_may_be_left_to_the_command_line(tmp_path: Path) -> None:
    read = recipe(tmp_path, "exports:\n  - format: gptq\n")
    assert read.options("m", "o", {}) == Options(model="m", exports=(Export(output="o", format="gptq"),))
    assert recipe(tmp_path, "method: rtn").options("m", "o", {}).exports == (Export(output="o"),)
    with pytest.raises(InputError, match="says no model: give MODEL"):
        read.options(None, "o", {})
    with pytest.raises(InputError, match=r"line 2: exports\.0\.output is missing"):
        read.options("m", None, {})
    with pytest.raises(InputError, match="no exports: give --output"):
        recipe(tmp_path, "method: rtn").options("m", None, {})


def test_a_calibration_text_may_lie_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("text")
    read = recipe(tmp_path, "calibration: notes.txt")
    assert read.options("m", "o", {}).calibration == str(tmp_path / "notes.txt")
    assert read.options("m", "o", {"calibration": "other.txt"}).calibration == "other.txt"
    (tmp_path / "self").write_text("not this")
    for kept in ("org/name:train", "self", "builtin"):
        assert recipe(tmp_path, f"calibration: {kept}").options("m", "o", {}).calibration == kept


def test_bounds_may_stand_in_the_recipe(tmp_path: Path) -> None:
    text = "gate:\n  confidence: 0.9\n  gates:\n    - {name: kl, metric: divergence.mean_kl, max: 0.1}\n"
    gate = recipe(tmp_path, text).gate
    assert gate is not None
    assert gate.inline() == {
        "version": 1,
        "confidence": 0.9,
        "gates": [{"name": "kl", "metric": "divergence.mean_kl", "max": 0.1}],
    }
    assert recipe(tmp_path, "gate: mine.yaml").gate.file == str(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("methd: gptq", "line 1: unknown key 'methd' .did you mean method.*; known: model, exports"),
        (
            "method: rtn\noverrides:\n  - module: x\n    scheme: keep\n",
            r"line 3: unknown key 'overrides.0.module'.*modules",
        ),
        ("exports:\n  - output: a\n    formt: gptq\n", r"line 3: unknown key 'exports.0.formt' .did you mean format"),
        ("method: gptq\nsamples: many", "line 2: samples: .*integer, not 'many'"),
        ("desc_act: 1", "line 1: desc_act: .*boolean"),
        ("ignore: down_proj", "line 1: ignore: .*list, not 'down_proj'"),
        ("quantizer: gptqmodel", "line 1: quantizer: .*auto-gptq"),
        ("method: gptq\nscheme: [w4a16\n", "line 3: "),
        ("method: gptq\n\tscheme: w4a16", "line 2: "),
        ("method: rtn\nscheme: q4_0\nmethod: gptq\n", "line 3: the key 'method' comes twice, first in line 1"),
        ("gate: {gates: [{name: a, name: b}]}", "line 1: the key 'name' comes twice"),
        ("a: &a [x, x]\nb: [*a, *a]", "line 2: aliases"),
        ("scheme: !!python/object/apply:os.system [true]", "line 1: .*python"),
        ("[" * 5000, "recipe.yaml"),
        ("- a\n- b", "is no recipe"),
        ("", "is no recipe"),
        ("1: 2", "is no recipe"),
        (b"\xff\xfe\xfa", "not UTF-8"),
        (b"# " + b"x" * 300_000, "longer than"),
        ("gate: 7", "line 1: gate must be a gate file's name"),
        ("gate: {windows: 3}", "line 1: gate needs either `file`"),
        ("gate: {file: a.yaml, gates: [{name: x}]}", "either `file`"),
        ("gate: {file: a.yaml, confidence: 0.9}", "stand in"),
        ("gate:\n  file: a.yaml\n  window: 3", "line 3: gate: unknown key 'window' .did you mean windows"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(text: str | bytes, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says) as error:
        recipe(tmp_path, text).options("model", "out", {})
    assert "\n" not in str(error.value)
    assert str(tmp_path / "recipe.yaml") in str(error.value)


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.yaml cannot be read"):
        read_recipe(tmp_path / "nowhere.yaml")
