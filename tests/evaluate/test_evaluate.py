"""Whole evaluations of small models, against transformers and against what must hold of any model."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import llmopt
from llmopt.errors import InputError
from llmopt.evaluate.evaluate import evaluate
from llmopt.evaluate.text import cut_windows, read_text
from llmopt.model.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def folder(tiny_model) -> str:
    return str(tiny_model("llama")[0])


@pytest.fixture(scope="module")
def blurred(tiny_model, tmp_path_factory) -> str:
    """The same model with noise on one matrix."""
    copy = tmp_path_factory.mktemp("blurred") / "model"
    shutil.copytree(tiny_model("llama")[0], copy)
    weights = load_file(copy / "model.safetensors")
    head = weights["lm_head.weight"]
    weights["lm_head.weight"] = head + 0.5 * head.std() * torch.randn(head.shape, generator=torch.manual_seed(0))
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return str(copy)


def truth(model: torch.nn.Module, folder: str, ctx: int, windows: int) -> torch.Tensor:
    """Log-probabilities of transformers, float64 [windows, ctx - 1, vocabulary], and the tokens [windows, ctx]."""
    tokens = torch.tensor(cut_windows(load_tokenizer(folder), read_text(None), ctx, windows).tokens)
    with torch.no_grad():
        return torch.log_softmax(model(tokens).logits[:, :-1].double(), dim=-1), tokens


def test_perplexity_is_that_of_transformers(tiny_model, folder):
    logprobs, tokens = truth(tiny_model("llama")[1], folder, ctx=24, windows=4)
    expected = float(torch.exp(-logprobs.gather(2, tokens[:, 1:, None]).mean()))
    result = evaluate(folder, ctx=24, windows=4, backend="reference")
    assert result["perplexity"] == {"value": pytest.approx(expected, rel=1e-5), "reference": None, "ratio": None}
    assert result["divergence"] is None and list(result["intervals"]) == ["perplexity.value"]
    assert result["text"]["predicted_tokens"] == 4 * 23


def test_divergence_is_that_of_transformers(tiny_model, folder, blurred):
    import transformers

    other = transformers.AutoModelForCausalLM.from_pretrained(blurred, dtype=torch.float32)
    p, _ = truth(tiny_model("llama")[1], folder, ctx=24, windows=4)
    q, _ = truth(other, folder, ctx=24, windows=4)
    kl = (p.exp() * (p - q)).sum(-1).numpy()
    result = evaluate(blurred, reference=folder, ctx=24, windows=4, backend="reference")
    assert result["divergence"]["mean_kl"] == pytest.approx(kl.mean(), rel=1e-4)
    assert result["divergence"]["p99_kl"] == pytest.approx(np.percentile(kl, 99), rel=1e-4)
    assert result["divergence"]["top1"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    ratio = result["perplexity"]["value"] / result["perplexity"]["reference"]
    assert result["perplexity"]["ratio"] == pytest.approx(ratio)
    for name, (low, high) in result["intervals"].items():
        group, _, key = name.partition(".")
        assert low <= result[group][key] <= high
    json.dumps(result, allow_nan=False)


def test_chunks_of_logits_join_without_a_seam(folder, monkeypatch):
    whole = evaluate(folder, reference=folder, ctx=33, windows=2, backend="reference")
    monkeypatch.setattr("llmopt.engine.scoring.CHUNK", 8)  # the last block is one row, which predicts nothing
    pieces = evaluate(folder, reference=folder, ctx=33, windows=2, backend="reference")
    assert pieces["perplexity"]["value"] == pytest.approx(whole["perplexity"]["value"], rel=1e-6)
    alone = evaluate(folder, ctx=33, windows=2, backend="reference")
    assert alone["perplexity"]["value"] == pytest.approx(whole["perplexity"]["value"], rel=1e-6)


def test_a_gate_judges_what_was_measured(folder, blurred, tmp_path):
    gates = tmp_path / "gates.yaml"
    gates.write_text(
        "{version: 1, confidence: 0.9, gates: [{name: close, metric: divergence.mean_kl, max: 1.0e-6}, "
        "{name: top, metric: divergence.top1, min: 0.01}]}"
    )
    verdicts = {}
    for model in (folder, blurred):
        result = evaluate(model, reference=folder, ctx=24, windows=4, gates=gates, backend="reference")
        assert result["confidence"] == 0.9
        verdicts[model] = [gate["verdict"] for gate in result["gates"]]
    assert verdicts == {folder: ["pass", "pass"], blurred: ["fail", "pass"]}
    with pytest.raises(InputError, match="give --reference"):
        evaluate(folder, gates=gates)


def test_models_of_different_tokenizers_are_refused(folder, smollm2):
    with pytest.raises(InputError, match="tokenize the text differently"):
        evaluate(folder, reference=smollm2, ctx=24, windows=2)


def test_windows_longer_than_the_model_are_refused(folder):
    with pytest.raises(InputError, match="256"):
        evaluate(folder, ctx=300, windows=1)


@pytest.mark.model
def test_the_built_in_model_reads_english(smollm2):
    result = llmopt.evaluate(smollm2, reference=smollm2, ctx=48, windows=2)
    assert 5 < result["perplexity"]["value"] < 150
    assert result["divergence"]["mean_kl"] < 0.02 and result["divergence"]["top1"] > 0.9
