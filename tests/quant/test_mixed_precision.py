"""A budget of bits: what may be chosen, what is refused, and what comes of it in a whole run."""

import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from llmopt.engine.config import EngineConfig
from llmopt.engine.scoring import Scorer
from llmopt.errors import InputError
from llmopt.model.decoder import LINEAR_GROUPS
from llmopt.model.source import open_source
from llmopt.quant import pipeline
from llmopt.quant.options import make_options
from llmopt.quant.pipeline import quantize
from llmopt.quant.recipe import Recipe, resolve

SMALL = {"samples": 4, "seq_len": 64, "calibration": "builtin"}


def recipe(folder: Path, output: str = "out", format: str | None = "gptq", **options) -> Recipe:
    exports = [{"output": output, "format": format}]
    made = make_options({"model": str(folder), "exports": exports, "method": "rtn", **SMALL, **options})
    return resolve(made, open_source(str(folder)).config)


def names(recipe: Recipe, layer: int, group: str) -> list[tuple[str, int]]:
    assert recipe.mixture is not None
    (part,) = [part for part in recipe.mixture.parts if (part.layer, part.group) == (layer, group)]
    return [(scheme.name, scheme.group_size) for scheme in part.schemes]


def mean_kl(folder: Path, output: Path) -> float:
    tokens = torch.randint(3, 300, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    truth, found = (
        torch.cat(list(Scorer(EngineConfig(model=str(m), backend="reference")).logits(tokens))).double().log_softmax(-1)
        for m in (folder, output)
    )
    return float((truth.exp() * (truth - found)).sum(-1).mean())


def test_candidates_are_as_wide_as_what_is_asked_for_and_wider(tiny_model) -> None:
    folder, _ = tiny_model("llama")
    found = recipe(folder, scheme="w4a16", target_bpw=5)
    assert names(found, 0, "qkv") == [("w4a16", 64), ("w4a16", 32), ("w8a16", 64)]
    assert names(found, 0, "down") == [("w4a16", 32), ("w8a16", 32)]  # rows of 96
    found = recipe(folder, scheme="w3a16-asym", group_size=32, target_bpw=5)
    assert names(found, 2, "gate_up") == [("w3a16-asym", 32), ("w4a16-asym", 32), ("w8a16-asym", 32)]


def test_candidates_are_what_the_format_holds(tiny_model) -> None:
    folder, _ = tiny_model("llama")
    packed = recipe(folder, format="compressed-tensors", scheme="w4a16", target_bpw=5)
    assert names(packed, 0, "output") == [("w4a16", 64), ("w4a16", 32), ("w8a16", 64)]
    blocks = recipe(folder, "out.gguf", None, scheme="q4_0", target_bpw=6)
    assert {name for name, _ in names(blocks, 0, "down")} == {"q4_0", "q4_1", "q5_0", "q5_1", "q8_0"}


def test_overrides_and_ignored_layers_stand(tiny_model) -> None:
    folder, _ = tiny_model("llama")
    overrides = [{"modules": r"layers\.0\.mlp\.(gate|up)_proj", "scheme": "w8a16", "group_size": 32}]
    found = recipe(folder, scheme="w4a16", target_bpw=5.5, overrides=overrides, ignore=["down_proj"])
    assert found.mixture is not None
    places = defaultdict(list)
    for part in found.mixture.parts:
        places[part.layer, part.group].append([(s.name, s.group_size) for s in part.schemes])
    assert places[0, "gate_up"] == [[("w8a16", 32)], [("w8a16", 32)]]
    assert len(places[1, "gate_up"]) == 1
    assert not any(group == "down" for _, group in places)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target_bpw": 4.1}, r"4\.1 is below the 4\.3"),
        ({"target_bpw": 12.0}, r"12 is more than the 8\.3"),
        ({"target_bpw": 5.0, "format": "awq", "scheme": "w4a16-asym"}, "one scheme"),
        ({"target_bpw": 9.0, "format": "compressed-tensors", "scheme": "w8a8"}, "integer schemes"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(options: dict, message: str, tiny_model) -> None:
    folder, _ = tiny_model("llama")
    with pytest.raises(InputError, match=message):
        recipe(folder, **options)


@pytest.mark.parametrize(
    "method, scheme, name, target",
    [
        ("rtn", "w3a16", "gptq", 4.5),
        ("gptq", "w4a16", "compressed-tensors", 5.5),
        ("rtn", "q4_0", "q.gguf", 5.5),
    ],
)
def test_a_mixture_keeps_its_budget_and_what_is_fused_together(
    method: str, scheme: str, name: str, target: float, tiny_model, tmp_path: Path
) -> None:
    folder, _ = tiny_model("llama")
    format = None if name.endswith("gguf") else name
    output = tmp_path / name
    result = quantize(str(folder), str(output), method=method, scheme=scheme, format=format, target_bpw=target, **SMALL)
    allocation = result["allocation"]
    assert target - 0.5 < allocation["bpw"] <= target
    assert len({group["scheme"] for group in allocation["groups"]}) > 1
    source = open_source(str(output))
    bits = weights = 0
    for layer in range(source.config.num_layers):
        for members in LINEAR_GROUPS.values():
            found = [source.weight(f"model.layers.{layer}.{module}.weight") for module in members]
            assert len({(weight.bits, weight.group_size) for weight in found}) == 1
            weights += sum(weight.codes.numel() for weight in found)
            extra = 16 * (1 + (found[0].minimums is not None)) / found[0].group_size
            bits += sum(weight.codes.numel() * (weight.bits + extra) for weight in found)
    assert bits / weights == pytest.approx(allocation["bpw"], abs=1e-3)
    assert mean_kl(folder, output) < 0.6


def test_bits_go_where_they_are_missed(tiny_model, tmp_path: Path, monkeypatch) -> None:
    """The same budget, spent on what was measured to suffer least, leaves more divergence."""
    folder, _ = tiny_model("qwen3")
    settings = {"method": "rtn", "scheme": "w4a16", "format": "gptq", "group_size": 32, "target_bpw": 6.5, **SMALL}
    right = quantize(str(folder), str(tmp_path / "right"), **settings)
    measure = pipeline.measure

    def upside_down(*args):
        return [[loss / losses[0] ** 2 for loss in losses] for losses in measure(*args)]

    monkeypatch.setattr(pipeline, "measure", upside_down)
    wrong = quantize(str(folder), str(tmp_path / "wrong"), **settings)
    assert abs(right["allocation"]["bpw"] - wrong["allocation"]["bpw"]) < 0.3
    assert mean_kl(folder, tmp_path / "right") < 0.9 * mean_kl(folder, tmp_path / "wrong")


def test_a_resumed_run_does_not_measure_again(tiny_model, tmp_path: Path, monkeypatch) -> None:
    folder, _ = tiny_model("llama")
    settings = {"method": "rtn", "scheme": "w3a16", "format": "gptq", "target_bpw": 4.5, **SMALL}
    whole = quantize(str(folder), str(tmp_path / "whole"), **settings)
    keep = pipeline.WorkFolder.keep_layer

    def interrupted(self, index, result):
        keep(self, index, result)
        if index == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline.WorkFolder, "keep_layer", interrupted)
        quantize(str(folder), str(tmp_path / "out"), **settings)
    monkeypatch.setattr(pipeline, "measure", lambda *_: pytest.fail("measured again"))
    resumed = quantize(str(folder), str(tmp_path / "out"), resume=True, **settings)
    assert resumed["allocation"] == whole["allocation"] == json.loads(json.dumps(whole["allocation"]))
    first, second = (tmp_path / name / "model.safetensors" for name in ("whole", "out"))
    assert first.read_bytes() == second.read_bytes()
