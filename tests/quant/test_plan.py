"""The plan of a quantization: what it refuses, and what it promises."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmopt.errors import InputError, LlmoptError
from llmopt.model.source import FolderSource, open_source
from llmopt.quant.estimate import Rates, estimate_memory, estimate_seconds
from llmopt.quant.export import parameter_order
from llmopt.quant.options import Options, make_options
from llmopt.quant.pipeline import quantize, run
from llmopt.quant.plan import make_plan
from llmopt.quant.recipe import resolve

SMALL = {"samples": 4, "seq_len": 64, "calibration": "builtin"}


@pytest.mark.parametrize(
    "kind",
    [
        {"method": "gptq", "scheme": "w4a16", "group_size": 32},
        {"method": "rtn", "scheme": "w3a16-asym", "format": "gptq", "group_size": 32},
        {"method": "awq", "scheme": "w4a16-asym", "format": "awq", "group_size": 32},
        *({"method": "rtn", "scheme": scheme} for scheme in ("w8a8", "fp8", "nvfp4", "mxfp4")),
        {"method": "rtn", "scheme": "w8a16", "group_size": 32},
    ],
)
def test_shapes_are_known_from_the_headers(kind: dict, tiny_model, tmp_path: Path) -> None:
    folder, _ = tiny_model("qwen2")
    options = SMALL if kind["method"] != "rtn" else {}
    quantize(str(folder), str(tmp_path / "out"), **{"format": "compressed-tensors"} | kind | options)
    source = open_source(str(tmp_path / "out"))
    for name, shape in parameter_order(source).items():
        assert source.shape(name) == tuple(source.weight(name).shape) == shape


def test_shapes_are_known_from_a_gguf_header(tiny_model, tmp_path: Path) -> None:
    folder, _ = tiny_model("llama")
    quantize(str(folder), str(tmp_path / "out.gguf"), method="rtn", scheme="q8_0")
    source = open_source(str(tmp_path / "out.gguf"))
    for name, shape in parameter_order(source).items():
        assert source.shape(name) == tuple(source.weight(name).shape) == shape


def options(folder: Path, output: Path, **given) -> Options:
    export = {"output": str(output), "format": given.pop("format", None)}
    return make_options({"model": str(folder), "exports": [export], **given})


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("a", {"method": "gptq", "group_size": 32} | SMALL),
        ("a", {"method": "gptq", "scheme": "w3a16-asym", "desc_act": True, "group_size": -1} | SMALL),
        ("a", {"method": "rtn", "scheme": "w8a16", "group_size": 32, "ignore": ["down_proj"]}),
        ("a", {"method": "awq", "scheme": "w4a16-asym", "group_size": 32} | SMALL),
        ("a", {"method": "smoothquant", "scheme": "w8a8"} | SMALL),
        *(("a", {"method": "rtn", "scheme": scheme}) for scheme in ("fp8", "nvfp4", "mxfp4")),
        ("a.gguf", {"method": "rtn", "scheme": "q4_0"}),
        ("a.gguf", {"method": "rtn", "scheme": "q4_k_m"} | SMALL),
        ("a.gguf", {"method": "rtn", "scheme": "f16"}),
    ],
)
def test_the_plan_promises_what_is_written(name: str, given: dict, tiny_model, tmp_path: Path) -> None:
    folder, _ = tiny_model("qwen2")
    asked = options(folder, tmp_path / name, **given)
    plan = make_plan(asked)
    assert list(tmp_path.iterdir()) == []
    (manifest,) = run(asked)
    assert plan.exports[0].size_bytes == manifest["size_bytes"]
    assert sum(plan.schemes.values()) == len(manifest["modules"])
    # Whatever the machine, all that took time was foreseen.
    assert {phase for phase, seconds in manifest["phases"].items() if seconds > 0.01} <= plan.seconds.keys()
    assert all(seconds >= 0 for seconds in plan.seconds.values())
    written = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".gguf"))
    assert plan.disks[0].needed >= 0.9 * written  # headers are not counted
    assert json.loads(json.dumps(plan.to_dict()))["version"] == 1


def test_several_exports_are_added_up(tiny_model, tmp_path: Path) -> None:
    folder, _ = tiny_model("llama")
    exports = [{"output": str(tmp_path / name), "format": name} for name in ("gptq", "compressed-tensors")]
    asked = make_options({"model": str(folder), "exports": exports, "method": "rtn", "group_size": 32})
    plan = make_plan(asked)
    assert [export.size_bytes for export in plan.exports] == [manifest["size_bytes"] for manifest in run(asked)]
    assert plan.disks[0].needed == sum(2 * export.size_bytes for export in plan.exports)


REFUSED = [
    ({"scheme": "w5a16"}, "unknown scheme"),
    ({"seq_len": 100_000}, "--seq-len"),
    ({"calibration": "/nowhere.txt"}, "no file"),
    ({"samples": 100_000, "calibration": "builtin"}, "too few for 100000 samples"),
    ({"scheme": "w4a16-asym", "format": "compressed-tensors"}, "does not hold"),
]


@pytest.mark.parametrize(("given", "says"), REFUSED)
@pytest.mark.parametrize("door", [make_plan, run])
def test_plan_and_run_refuse_alike(door, given: dict, says: str, tiny_model, tmp_path: Path) -> None:
    folder, _ = tiny_model("llama")
    with pytest.raises(InputError, match=says):
        door(options(folder, tmp_path / "out", **{"method": "gptq", "group_size": 32} | SMALL | given))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("door", [make_plan, run])
class TestBothRefuse:
    """What is refused by the look of files, before any weight is read."""

    def test_a_shape_that_disagrees(self, door, tiny_model, tmp_path: Path, monkeypatch) -> None:
        shutil.copytree(tiny_model("llama")[0], tmp_path / "model")
        config = json.loads((tmp_path / "model/config.json").read_text())
        (tmp_path / "model/config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
        monkeypatch.setattr(FolderSource, "weight", None)  # whoever reads one is told
        with pytest.raises(InputError, match=r"gate_proj.weight is \[96, 64\], but its config says \[128, 64\]"):
            door(options(tmp_path / "model", tmp_path / "out", method="rtn", group_size=32))
        assert not (tmp_path / "out").exists()

    def test_an_output_that_is_taken(self, door, tiny_model, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/mine").touch()
        with pytest.raises(InputError, match="exists and is not empty"):
            door(options(tiny_model("llama")[0], tmp_path / "out", method="rtn", group_size=32))
        with pytest.raises(InputError, match="is a file"):
            door(options(tiny_model("llama")[0], tmp_path / "out/mine/deeper", method="rtn", group_size=32))

    def test_a_disk_that_is_too_small(self, door, tiny_model, tmp_path: Path, monkeypatch) -> None:
        usage = SimpleNamespace(free=100_000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(LlmoptError, match=r"MB are to be written under .*, and 0\.1 MB are free") as error:
            door(options(tiny_model("llama")[0], tmp_path / "out", method="rtn", group_size=32))
        assert error.value.exit_status == 3
        assert list(tmp_path.iterdir()) == []

    def test_layers_that_an_interrupted_run_has_kept(self, door, tiny_model, tmp_path: Path) -> None:
        work = tmp_path / ".out.work"
        work.mkdir()
        (work / "layer-0000.safetensors").touch()
        with pytest.raises(InputError, match="--resume"):
            door(options(tiny_model("llama")[0], tmp_path / "out", method="gptq", group_size=32, **SMALL))


def test_more_samples_take_more_time_and_memory(tiny_model, tmp_path: Path) -> None:
    folder, _ = tiny_model("llama")
    recipes = [
        options(folder, tmp_path / "out", method="gptq", group_size=32, **SMALL | {"samples": samples})
        for samples in (4, 400)
    ]
    source = open_source(str(folder))
    rates = Rates(products=1e9, exact=1e9, gram=1e9, elements=1e9)
    few, many = (resolve(asked, source.config) for asked in recipes)
    assert estimate_seconds(many, source, rates)["observe"] > 50 * estimate_seconds(few, source, rates)["observe"]
    memory = [sum(estimate_memory(recipe, source, torch.float32).values()) for recipe in (few, many)]
    assert memory[1] > memory[0]


@pytest.mark.model
def test_the_plan_for_a_real_model(smollm2: str, tmp_path: Path) -> None:
    asked = options(Path(smollm2), tmp_path / "out", method="gptq", group_size=64, calibration="builtin", samples=8)
    plan = make_plan(asked)
    assert plan.parameters == 134_515_008
    assert plan.exports[0].size_bytes == 114_523_776
    # What this process holds already depends on which tests ran before this one; the rest is the model's.
    own = {part: size for part, size in plan.memory.items() if part != "Python, torch and the tokenizer"}
    assert 0.1e9 < sum(own.values()) < 0.5e9
    assert max(plan.seconds, key=lambda phase: plan.seconds[phase]) in ("choose codes", "observe")
