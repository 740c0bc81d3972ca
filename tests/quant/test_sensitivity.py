"""The estimated divergence of a layer's schemes is the one that is found by putting them into the model."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmopt.backend.reference import ReferenceBackend
from llmopt.model.decoder import LINEAR_GROUPS
from llmopt.model.source import open_source
from llmopt.quant import sensitivity
from llmopt.quant.mixed_precision import Part
from llmopt.quant.sensitivity import measure
from llmopt.weights.scheme import SCHEMES

SCHEMES_HERE = tuple(SCHEMES[name].with_group_size(32) for name in ("w3a16", "w4a16", "w8a16"))
WIDTHS = {"qkv": 64, "output": 64, "gate_up": 64, "down": 96}


def parts(layers: int = 3) -> list[Part]:
    return [
        Part(layer, group, modules, weights=1, width=WIDTHS[group], schemes=SCHEMES_HERE)
        for layer in range(layers)
        for group, modules in LINEAR_GROUPS.items()
    ]


def tokens(samples: int = 8, length: int = 64) -> Tensor:
    return torch.randint(3, 300, (samples, length), generator=torch.Generator().manual_seed(0))


def found_divergence(model: torch.nn.Module, part: Part, scheme, text: Tensor) -> float:
    """The divergence by transformers, in float64, of a model whose one part is rounded."""
    from llmopt.quant.methods.rtn import round_to_nearest

    double = model.double()
    kept = {}
    with torch.no_grad():
        truth = double(text).logits.log_softmax(-1)
        for module in part.modules:
            weight = double.get_parameter(f"model.layers.{part.layer}.{module}.weight")
            kept[module] = weight.clone()
            weight.copy_(round_to_nearest(weight.float(), scheme, importance=torch.ones(weight.shape[1])).dequantize())
        found = double(text).logits.log_softmax(-1)
        for module, weight in kept.items():
            double.get_parameter(f"model.layers.{part.layer}.{module}.weight").copy_(weight)
    model.float()
    return float((truth.exp() * (truth - found)).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama-tied-biased", "qwen3", "mistral-window", "gemma2"])
def test_estimates_agree_with_the_divergence_that_is_found(family: str, tiny_model, monkeypatch) -> None:
    monkeypatch.setattr(sensitivity, "VOCABULARY_AT_ONCE", 100)  # so that there are several pieces
    folder, model = tiny_model(family)
    text = tokens()
    estimates = measure(open_source(str(folder)), text, parts(), ReferenceBackend("cpu"))
    found = [[found_divergence(model, part, scheme, text) for scheme in SCHEMES_HERE] for part in parts()]
    ratios = torch.tensor(estimates) / torch.tensor(found)
    # A few dozen outputs are few samples; a real layer's thousands come closer.
    assert ratios.log().abs().max() < 1.4, ratios
    assert ratios.log().abs().mean() < 0.45, ratios
    assert ratios.log().mean().abs() < 0.4, ratios


def test_inside_inference_mode_too_and_the_same_each_time(tiny_model) -> None:
    source = open_source(str(tiny_model("qwen2")[0]))
    outside = measure(source, tokens(), parts(), ReferenceBackend("cpu"))
    with torch.inference_mode():
        assert measure(source, tokens(), parts(), ReferenceBackend("cpu")) == outside


def test_modules_that_are_left_out_cost_nothing(tiny_model) -> None:
    """What is rounded of a group adds up, roughly, to the whole of it."""
    source = open_source(str(tiny_model("llama")[0]))
    whole = parts(1)[0]
    alone = [Part(0, "qkv", (module,), 1, 64, SCHEMES_HERE) for module in whole.modules]
    (of_whole, *of_each) = measure(source, tokens(), [whole, *alone], ReferenceBackend("cpu"))
    assert all(0 < loss < of_whole[0] * 1.2 for loss, *_ in of_each)
    assert sum(loss for loss, *_ in of_each) == pytest.approx(of_whole[0], rel=0.5)


def test_reads_some_of_many_samples(tiny_model, monkeypatch) -> None:
    source = open_source(str(tiny_model("llama")[0]))
    seen: list[tuple[int, ...]] = []
    sweep = sensitivity.CalibrationSweep

    def remember(source, tokens, *args, **kwargs):
        seen.append(tuple(tokens.shape))
        return sweep(source, tokens, *args, **kwargs)

    monkeypatch.setattr(sensitivity, "CalibrationSweep", remember)
    measure(source, tokens(20, 40), parts(1)[:1], ReferenceBackend("cpu"))
    assert seen == [(sensitivity.SAMPLES, 40)]


def test_a_tied_head_in_codes_serves_as_well(tiny_model, tmp_path: Path) -> None:
    """A GGUF file's head stays in its blocks and is taken apart piece by piece."""
    from llmopt.quant.pipeline import quantize

    folder, _ = tiny_model("llama-tied-biased")
    quantize(str(folder), str(tmp_path / "q8.gguf"), method="rtn", scheme="q8_0", format="gguf")
    plain, coded = (
        measure(open_source(str(path)), tokens(), parts(1)[:1], ReferenceBackend("cpu"))
        for path in (folder, tmp_path / "q8.gguf")
    )
    assert coded[0][0] == pytest.approx(plain[0][0], rel=0.3)
