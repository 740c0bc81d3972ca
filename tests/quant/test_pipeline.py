"""Whole quantizations of a small model: what is written is what was meant, whole or not at all."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from llmopt.engine.config import EngineConfig
from llmopt.engine.llm import LLM
from llmopt.engine.params import SamplingParams
from llmopt.engine.scoring import Scorer
from llmopt.errors import InputError, LlmoptError
from llmopt.model.source import as_dense, open_source
from llmopt.quant import pipeline
from llmopt.quant.pipeline import quantize
from llmopt.weights.quantized import QuantizedTensor

KINDS = {
    "gptq": {"method": "gptq", "scheme": "w4a16"},
    "gptq-act-order": {"method": "gptq", "scheme": "w4a16", "desc_act": True},
    "gptq-asym": {"method": "gptq", "scheme": "w4a16-asym", "format": "gptq"},
    "awq": {"method": "awq", "scheme": "w4a16-asym"},
    "w8a16": {"method": "rtn", "scheme": "w8a16"},
    "w8a8": {"method": "rtn", "scheme": "w8a8"},
    "w3a16": {"method": "gptq", "scheme": "w3a16"},
    "smoothquant": {"method": "smoothquant", "scheme": "w8a8"},
    "fp8": {"method": "smoothquant", "scheme": "fp8"},
    "nvfp4": {"method": "gptq", "scheme": "nvfp4"},
    "mxfp4": {"method": "gptq", "scheme": "mxfp4", "format": "compressed-tensors"},
    "mxfp4.gguf": {"method": "rtn", "scheme": "mxfp4"},
    "q4_k_m.gguf": {"method": "gptq", "scheme": "q4_k_m"},
    "q5_1.gguf": {"method": "rtn", "scheme": "q5_1"},
    "q8_0.gguf": {"method": "rtn", "scheme": "q8_0"},
    "q4_0.gguf": {"method": "rtn", "scheme": "q4_0"},
    "f16.gguf": {"method": "rtn", "scheme": "f16"},
}
SMALL = {"samples": 4, "seq_len": 64, "calibration": "builtin"}


FIXED = ("w8a8", "smoothquant", "fp8", "nvfp4", "mxfp4")  # schemes whose group size is not to choose


def options(kind: str) -> dict:
    return KINDS[kind] | SMALL | ({} if kind.endswith("gguf") or kind in FIXED else {"group_size": 32})


def logits(model: Path | str, tokens: list[int]) -> torch.Tensor:
    return torch.cat(list(Scorer(EngineConfig(model=str(model), backend="reference")).logits(tokens)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama3-rope", "qwen2", "llama-tied-biased"])
def test_artifact_is_complete_and_close_to_the_original(family: str, kind: str, tiny_model, tmp_path: Path) -> None:
    folder, _ = tiny_model(family)
    output = tmp_path / kind
    result = quantize(str(folder), str(output), **options(kind))
    tokens = list(range(3, 60))
    truth, found = logits(folder, tokens), logits(output, tokens)
    divergence = torch.nn.functional.kl_div(
        found.log_softmax(-1), truth.log_softmax(-1), log_target=True, reduction="sum"
    )
    divergence /= len(tokens)
    fine = kind in ("f16.gguf", "q8_0.gguf", "w8a16", "w8a8", "smoothquant", "fp8")
    assert divergence < (0.02 if fine else 1.5 if kind == "w3a16" else 0.6), f"KL {divergence:.4f}"
    assert open_source(str(output)).tokenizer.encode("the cat sat") == open_source(str(folder)).tokenizer.encode(
        "the cat sat"
    )
    assert result["bits_per_weight"] < (17 if kind == "f16.gguf" else 16)
    manifest = output if output.is_dir() else tmp_path
    manifest = manifest / ("llmopt.json" if output.is_dir() else f"{kind}.llmopt.json")
    assert json.loads(manifest.read_text()) == json.loads(json.dumps(result))
    assert len(result["modules"]) == (0 if kind == "f16.gguf" else 21)
    text = LLM(str(output), backend="reference", max_num_seqs=2).generate("the cat", SamplingParams(max_tokens=4))
    assert len(text[0].outputs[0].token_ids) <= 4


def test_written_codes_are_those_the_method_chose(tiny_model, tmp_path: Path, monkeypatch) -> None:
    """Through file and reader, every quantized tensor comes back bit for bit."""
    folder, _ = tiny_model("llama")
    meant: dict[str, QuantizedTensor] = {}
    check = pipeline._check_finite

    def remember(name, weight):
        meant[name] = weight
        check(name, weight)

    monkeypatch.setattr(pipeline, "_check_finite", remember)
    for kind in ("gptq-act-order", "gptq-asym", "awq", "w8a8", "q4_0.gguf"):
        meant.clear()
        quantize(str(folder), str(tmp_path / kind), **options(kind))
        source = open_source(str(tmp_path / kind))
        quantized = {name: w for name, w in meant.items() if isinstance(w, QuantizedTensor)}
        assert len(quantized) == 21
        for name, weight in quantized.items():
            found = source.weight(name)
            assert isinstance(found, QuantizedTensor)
            torch.testing.assert_close(found.dequantize(), weight.dequantize(), atol=0, rtol=0)
            assert found.activations == weight.activations


@pytest.mark.parametrize("kind", ["gptq", "awq", "q4_0.gguf"])
def test_the_same_command_gives_the_same_bytes(kind: str, tiny_model, tmp_path: Path) -> None:
    folder, _ = tiny_model("qwen3")
    written = []
    for name in "ab":
        output = tmp_path / name / kind
        quantize(str(folder), str(output), **options(kind) | {"calibration": "self"})
        written.append((output if output.is_file() else output / "model.safetensors").read_bytes())
    if kind.endswith("gguf"):  # its header tells the output's name
        written = [content.replace(b"/a/", b"/b/") for content in written]
    assert written[0] == written[1]


def test_a_failure_leaves_nothing(tiny_model, tmp_path: Path, monkeypatch) -> None:
    folder, _ = tiny_model("llama")
    calls = []

    def fail(name, weight):
        calls.append(name)
        if "layers.1" in name:
            raise LlmoptError(f"{name} came out with values that are not finite; nothing was written")

    monkeypatch.setattr(pipeline, "_check_finite", fail)
    for kind in ("w8a16", "q8_0.gguf"):
        with pytest.raises(LlmoptError, match="not finite"):
            quantize(str(folder), str(tmp_path / kind), **options(kind) | {"calibration": None})
    assert calls
    assert list(tmp_path.iterdir()) == []


def test_not_finite_weights_are_refused(tiny_model, tmp_path: Path, monkeypatch) -> None:
    folder, _ = tiny_model("llama")
    source = open_source(str(folder))
    weights = source.layer(1)
    weights["mlp.up_proj.weight"] = weights["mlp.up_proj.weight"].clone()
    weights["mlp.up_proj.weight"][0, 0] = float("nan")
    original = type(source).layer
    monkeypatch.setattr(type(source), "layer", lambda self, i: weights if i == 1 else original(self, i))
    with pytest.raises(LlmoptError, match=r"model\.layers\.1\.mlp\.up_proj"):
        quantize(str(folder), str(tmp_path / "out"), **options("w8a16") | {"calibration": None})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"scheme": "w5a16"}, "unknown scheme 'w5a16'.*w4a16"),
        ({"method": "gtpq"}, "did you mean gptq"),
        ({"format": "gptqq"}, "did you mean gptq"),
        ({"group_size": 48}, "48 does not divide rows of 64.*64, 32|48 does not divide rows of 64.*32"),
        ({"group_size": 0}, "positive number"),
        (
            {"scheme": "w8a8", "method": "awq", "format": "compressed-tensors", "group_size": None},
            "does not go with w8a8",
        ),
        ({"method": "smoothquant"}, "w8a8 and fp8"),
        ({"method": "awq"}, "awq does not hold w4a16; it holds w4a16-asym"),
        ({"scheme": "q4_0", "method": "rtn", "group_size": None}, "ends in .gguf"),
        ({"samples": 0}, "at least 1"),
        ({"seq_len": 4}, "between 8 and"),
        ({"seq_len": 100000}, "between 8 and the model's 256"),
        ({"damp": 2.0}, "between 0 and 1"),
        ({"device": "gpu"}, "unknown device 'gpu'; known: auto, cpu, cuda"),
        ({"ignore": ("no_such_layer",)}, "matches no linear layer"),
        ({"ignore": ("(",)}, "no regular expression"),
        ({"calibration": "/nowhere/text.txt"}, "there is no file"),
        ({"samples": 100000}, "too few for 100000 samples"),
        ({"desc_act": True, "method": "rtn"}, "needs --method gptq"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(wrong: dict, says: str, tiny_model, tmp_path: Path) -> None:
    folder, _ = tiny_model("llama")
    with pytest.raises(InputError, match=says):
        quantize(str(folder), str(tmp_path / "out"), **options("gptq") | wrong)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_is_kept_unless_told_otherwise(tiny_model, tmp_path: Path) -> None:
    folder, _ = tiny_model("llama")
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is not empty"):
        quantize(str(folder), str(output), **options("w8a16"))
    with pytest.raises(InputError, match=r"holds no llmopt\.json"):
        quantize(str(folder), str(output), **options("w8a16"), overwrite=True)
    assert (output / "thesis.txt").read_text() == "mine"
    (output / "thesis.txt").rename(output / "llmopt.json")
    quantize(str(folder), str(output), **options("w8a16"), overwrite=True)
    assert (output / "model.safetensors").exists()


def test_the_source_is_never_overwritten(tiny_model, tmp_path: Path) -> None:
    source = tmp_path / "all" / "base"
    shutil.copytree(tiny_model("llama")[0], source)
    for output in (source, source.parent):
        (output / "llmopt.json").write_text("{}")
        with pytest.raises(InputError, match="choose another output"):
            quantize(str(source), str(output), **options("w8a16"), overwrite=True)
    assert (source / "model.safetensors").exists()


def test_ignored_layers_stay_dense(tiny_model, tmp_path: Path) -> None:
    folder, _ = tiny_model("llama")
    for kind in ("gptq", "awq", "w8a16", "q4_0.gguf"):
        quantize(str(folder), str(tmp_path / kind), **options(kind), ignore=(r"layers\.0\.", "down_proj"))
        source = open_source(str(tmp_path / kind))
        for layer in range(3):
            for name, weight in source.layer(layer).items():
                expected = "proj" in name and layer > 0 and "down" not in name
                assert isinstance(weight, QuantizedTensor) == expected, name
                if not expected and layer == 0 and kind != "awq":
                    original = as_dense(open_source(str(folder)).layer(layer)[name])
                    torch.testing.assert_close(as_dense(weight), original, atol=2e-3, rtol=1e-3)


def test_layers_that_share_a_rounded_input_are_ignored_together(tiny_model, tmp_path: Path) -> None:
    folder, _ = tiny_model("llama")
    with pytest.raises(InputError, match="all of them or none"):
        quantize(str(folder), str(tmp_path / "out"), **options("w8a8"), ignore=("q_proj",))
    quantize(str(folder), str(tmp_path / "out"), **options("w8a8"), ignore=("self_attn.[qkv]_proj",))
    assert logits(tmp_path / "out", [5, 6, 7]).isfinite().all()


def test_awq_leaves_an_ignored_absorber_alone(tiny_model, tmp_path: Path) -> None:
    folder, _ = tiny_model("llama")
    quantize(str(folder), str(tmp_path / "out"), **options("awq"), ignore=("(gate|up)_proj",))
    for layer in range(3):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        found, original = (as_dense(open_source(str(p)).weight(name)) for p in (tmp_path / "out", folder))
        torch.testing.assert_close(found, original, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", ["mistral-window", "qwen2"])
def test_gguf_and_back_to_a_folder_keeps_the_function(family: str, tiny_model, tmp_path: Path) -> None:
    """Names, windows, biases and the order of rows survive both ways; transformers judges the folder."""
    import transformers

    folder, model = tiny_model(family)
    quantize(str(folder), str(tmp_path / "f16.gguf"), method="rtn", scheme="f16")
    quantize(str(tmp_path / "f16.gguf"), str(tmp_path / "w8"), method="rtn", scheme="w8a16", group_size=32)
    tokens = list(range(3, 60))
    with torch.no_grad():
        truth = model(torch.tensor([tokens])).logits[0]
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "w8", dtype=torch.float32)
        theirs = again(torch.tensor([tokens])).logits[0].float()
    torch.testing.assert_close(logits(tmp_path / "f16.gguf", tokens), truth, atol=0.02, rtol=0.01)
    torch.testing.assert_close(theirs, truth, atol=0.1, rtol=0.05)


def test_gguf_cannot_say_windows_on_some_layers(tiny_model, tmp_path: Path) -> None:
    folder, _ = tiny_model("qwen2-window")
    with pytest.raises(InputError, match="some of its layers only"):
        quantize(str(folder), str(tmp_path / "f16.gguf"), method="rtn", scheme="f16")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_generation_config_stays_without(tiny_model, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_model("llama")[0], source)
    (source / "generation_config.json").unlink(missing_ok=True)
    quantize(str(source), str(tmp_path / "out"), **options("w8a16"))
    assert not (tmp_path / "out" / "generation_config.json").exists()


def test_a_gguf_can_be_quantized_again(tiny_model, tmp_path: Path) -> None:
    current, _ = tiny_model("qwen3")
    for turn, scheme in enumerate(("q4_0", "q8_0", "q4_0")):
        output = tmp_path / f"{turn}.gguf"
        quantize(str(current), str(output), method="rtn", scheme=scheme)
        assert logits(output, [5, 6, 7]).isfinite().all()
        current = output
