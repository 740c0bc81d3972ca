"""Quantizing mixtures of experts and other families whose layers differ from Llama's."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from llmopt.backend.reference import ReferenceBackend
from llmopt.engine.config import EngineConfig
from llmopt.engine.scoring import Scorer
from llmopt.errors import InputError
from llmopt.model.decoder import DecoderLayer, config_groups
from llmopt.model.source import as_dense, layer_name, open_source
from llmopt.quant.calibration import CalibrationSweep
from llmopt.quant.estimate import layer_weights, used_weights
from llmopt.quant.methods.awq import AWQ
from llmopt.quant.methods.base import InputStatistics
from llmopt.quant.methods.gptq import GPTQ
from llmopt.quant.methods.rtn import RoundToNearest, round_to_nearest
from llmopt.quant.methods.smoothquant import SmoothQuant
from llmopt.quant.options import make_options
from llmopt.quant.pipeline import quantize, run
from llmopt.quant.plan import check, make_plan
from llmopt.quant.recipe import resolve
from llmopt.weights.quantized import QuantizedTensor
from llmopt.weights.scheme import SCHEMES

SMALL = {"samples": 4, "seq_len": 64, "calibration": "builtin"}
KINDS = {
    "gptq": {"method": "gptq", "scheme": "w4a16", "group_size": 16},
    "gptq-act-order": {"method": "gptq", "scheme": "w4a16", "group_size": 16, "desc_act": True},
    "awq": {"method": "awq", "scheme": "w4a16-asym", "group_size": 16},
    "rtn-compressed": {"method": "rtn", "scheme": "w4a16", "group_size": 16, "format": "compressed-tensors"},
    "smoothquant": {"method": "smoothquant", "scheme": "w8a8"},
}


def logits(model: Path | str) -> torch.Tensor:
    return torch.cat(list(Scorer(EngineConfig(model=str(model), backend="reference")).logits(list(range(3, 60)))))


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("phi3", "gptq-act-order"),
        ("phi3", "awq"),
        ("phi3", "rtn-compressed"),
        ("gemma2", "gptq"),
        ("gemma2", "smoothquant"),
        ("gemma3", "awq"),
        ("gemma3", "smoothquant"),
        ("mixtral", "gptq"),
        ("mixtral", "smoothquant"),
        ("qwen3-moe", "gptq-act-order"),
        ("qwen3-moe", "awq"),
    ],
)
def test_artifact_is_complete_and_close_to_the_original(family: str, kind: str, tiny_model, tmp_path: Path) -> None:
    folder, _ = tiny_model(family)
    output = tmp_path / "artifact"
    result = quantize(str(folder), str(output), **KINDS[kind], **SMALL)
    truth, found = logits(folder).log_softmax(-1), logits(output).log_softmax(-1)
    divergence = float((truth.exp() * (truth - found)).sum(-1).mean())
    # Far less than a fold that forgets the 1 of (1 + w) would cost, 0.002.
    assert divergence < (2e-4 if kind == "smoothquant" else 0.6)
    config = open_source(str(folder)).config
    linears = [
        layer_name(layer, module)
        for layer in range(config.num_layers)
        for members in config_groups(config, layer).values()
        for module in members
    ]
    assert [module["name"] for module in result["modules"]] == linears
    written = open_source(str(output))
    assert all(isinstance(written.weight(f"{name}.weight"), QuantizedTensor) for name in linears)


@pytest.mark.parametrize("family", ["phi3", "mixtral"])
def test_planned_size_is_the_written_one(family: str, tiny_model, tmp_path: Path) -> None:
    exports = [{"output": str(tmp_path / "m"), "format": "gptq"}]
    settled = make_options(
        {"model": str(tiny_model(family)[0]), "exports": exports, "method": "rtn", "scheme": "w4a16", "group_size": 16}
    )
    source = open_source(settled.model)
    (planned,), _ = check(resolve(settled, source.config), source, overwrite=False)
    (result,) = run(settled)
    assert planned.size_bytes == result["size_bytes"]


def test_a_plan_counts_every_expert_and_works_only_with_those_that_a_token_meets(tiny_model, tmp_path: Path) -> None:
    folder, model = tiny_model("mixtral")
    exports = [{"output": str(tmp_path / "m")}]
    plan = make_plan(make_options({"model": str(folder), "exports": exports} | KINDS["gptq"] | SMALL))
    assert plan.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert plan.schemes == {"w4a16": 3 * (4 + 5 * 3)}
    config = open_source(str(folder)).config
    experts = 3 * 3 * 64 * 96  # of three layers, an expert in each
    assert sum(layer_weights(config)) - used_weights(config) == 3 * experts


def tensors_of(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_artifacts_name_tensors_as_the_family_does(tiny_model, tmp_path: Path) -> None:
    """Runtimes look for the family's own names, and for routers among what is not quantized."""
    options = KINDS["rtn-compressed"]
    quantize(str(tiny_model("mixtral")[0]), str(tmp_path / "mixtral"), **options)
    names = tensors_of(tmp_path / "mixtral")
    assert {
        "model.layers.2.block_sparse_moe.experts.4.w2.weight_packed",
        "model.layers.0.block_sparse_moe.gate.weight",
    } <= names
    settings = json.loads((tmp_path / "mixtral" / "config.json").read_text())["quantization_config"]
    assert "model.layers.1.block_sparse_moe.gate" in settings["ignore"]
    quantize(str(tiny_model("phi3")[0]), str(tmp_path / "phi3"), **options)
    names = tensors_of(tmp_path / "phi3")
    assert {"model.layers.0.self_attn.qkv_proj.weight_packed", "model.layers.2.mlp.gate_up_proj.weight_scale"} <= names
    assert not any("q_proj" in name or "mlp.up_proj" in name for name in names)


def test_ignored_parts_of_fused_tensors_stay_dense_together(tiny_model, tmp_path: Path) -> None:
    folder, _ = tiny_model("phi3")
    quantize(str(folder), str(tmp_path / "a"), **KINDS["gptq"], **SMALL, ignore=[r"\.0\.self_attn\.[qkv]_proj"])
    first, written = open_source(str(folder)), open_source(str(tmp_path / "a"))
    keys = [as_dense(model.layer(0)["self_attn.k_proj.weight"]) for model in (first, written)]
    assert torch.equal(*keys)
    with pytest.raises(InputError, match="runtimes make one operation"):
        quantize(str(folder), str(tmp_path / "b"), **KINDS["gptq"], **SMALL, ignore=[r"\.0\.self_attn\.q_proj"])


@pytest.mark.parametrize("family", ["gemma2", "mixtral", "qwen3-moe", "phi3"])
def test_what_is_not_written_is_refused(family: str, tiny_model, tmp_path: Path) -> None:
    folder, _ = tiny_model(family)
    with pytest.raises(InputError, match="are not written to gguf"):
        quantize(str(folder), str(tmp_path / "m.gguf"), method="rtn", scheme="q8_0")
    if family in ("mixtral", "qwen3-moe"):
        with pytest.raises(InputError, match="does not know models with experts"):
            quantize(str(folder), str(tmp_path / "m"), **KINDS["gptq"], target_bpw=5.0)


@pytest.mark.parametrize("family", ["phi3-longrope-short", "gemma2", "gemma3", "mixtral", "qwen3-moe-sparse"])
def test_calibration_sees_what_serving_computes(family: str, tiny_model) -> None:
    folder, model = tiny_model(family)
    source, backend = open_source(str(folder)), ReferenceBackend("cpu")
    tokens = torch.randint(3, 300, (3, 40), generator=torch.Generator().manual_seed(0))
    sweep = CalibrationSweep(source, tokens, backend)
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states
    seen = 0
    for index in range(source.config.num_layers):
        # transformers gives the last layer's state only after the final norm
        torch.testing.assert_close(torch.cat(sweep.batches), states[index], atol=1e-4, rtol=1e-4)
        layer = DecoderLayer(source.config, index, source.layer(index), backend)
        statistics = sweep.observe(layer)
        assert set(statistics) == set(config_groups(source.config, index))
        if source.config.has_experts(index):
            assert source.config.experts is not None
            seen = sum(s.tokens for group, s in statistics.items() if group.endswith(".down"))
            assert seen == tokens.numel() * source.config.experts.chosen
        sweep.advance(layer)
    assert seen or source.config.experts is None


WIDTH, INNER = 32, 48


def expert_layer(norm: float = 1.0) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    shapes = {"q_proj": (32, 32), "k_proj": (32, 32), "v_proj": (32, 32), "o_proj": (32, 32)}
    weights = {f"self_attn.{name}.weight": torch.randn(*s, generator=random) * 0.1 for name, s in shapes.items()}
    for expert in range(3):
        for name, shape in (("gate_proj", (INNER, WIDTH)), ("up_proj", (INNER, WIDTH)), ("down_proj", (WIDTH, INNER))):
            weights[f"mlp.experts.{expert}.{name}.weight"] = torch.randn(*shape, generator=random) * 0.1
    weights["mlp.gate.weight"] = torch.randn(3, WIDTH, generator=random)
    return weights | {f"{n}_layernorm.weight": torch.full((WIDTH,), norm) for n in ("input", "post_attention")}


def seen(width: int, tokens: int) -> InputStatistics:
    statistics = InputStatistics(width, keep_rows=64)
    if tokens:
        statistics.add(torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens)))
    return statistics


def expert_statistics(tokens: tuple[int, int, int]) -> dict[str, InputStatistics]:
    found = {"qkv": seen(WIDTH, 200), "output": seen(32, 200)}
    for expert, count in enumerate(tokens):
        found |= {f"experts.{expert}.gate_up": seen(WIDTH, count), f"experts.{expert}.down": seen(INNER, count)}
    return found


def all_linears(weights: dict[str, torch.Tensor], scheme) -> dict:
    return {name.removesuffix(".weight"): scheme for name in weights if "_proj" in name}


def test_gptq_rounds_an_expert_that_few_tokens_came_to() -> None:
    """By a Hessian of its own where there are enough; else to nearest, which the report says."""
    weights, scheme = expert_layer(), SCHEMES["w4a16"].with_group_size(16)
    result = GPTQ().quantize_layer(weights, all_linears(weights, scheme), expert_statistics((200, 7, 0)))
    reports = {report.name: report for report in result.modules}
    assert reports["mlp.experts.0.up_proj"].method == "gptq"
    assert reports["mlp.experts.0.up_proj"].fallback is None
    for expert, tokens in ((1, 7), (2, 0)):
        for name, least in (("gate_proj", 8), ("up_proj", 8), ("down_proj", 12)):
            report = reports[f"mlp.experts.{expert}.{name}"]
            assert report.method == "rtn"
            assert report.fallback is not None
            assert f"{tokens} tokens came to this expert, {least} are needed" in report.fallback
            assert report.error > 0
            weight = weights[f"mlp.experts.{expert}.{name}.weight"]
            codes = result.weights[f"mlp.experts.{expert}.{name}.weight"].codes
            assert torch.equal(codes, round_to_nearest(weight, scheme).codes)


@pytest.mark.parametrize("method", [RoundToNearest(), AWQ(32), SmoothQuant(32)])
def test_an_expert_that_no_token_came_to_is_still_itself(method) -> None:
    weights = expert_layer()
    scheme = SCHEMES["w8a8" if method.name == "smoothquant" else "w8a16-asym"]
    scheme = scheme.with_group_size(16) if method.name != "smoothquant" else scheme.for_widths({WIDTH, INNER})
    result = method.quantize_layer(weights, all_linears(weights, scheme), expert_statistics((200, 100, 0)))
    for name in ("gate_proj", "up_proj", "down_proj"):
        name = f"mlp.experts.2.{name}.weight"
        torch.testing.assert_close(result.weights[name].dequantize(), weights[name], atol=0.01, rtol=0.05)
    assert all(report.error > 0 for report in result.modules)
    if method.name != "rtn":
        reasons = {report.name: report.fallback for report in result.modules}
        assert "the router share them" in str(reasons["mlp.experts.0.gate_proj"])
        assert reasons["mlp.experts.0.down_proj"] is reasons["self_attn.q_proj"] is None
    # Scales that suit one expert would not suit another: what the router sees stays as it is.
    assert torch.equal(result.weights["mlp.gate.weight"], weights["mlp.gate.weight"])
    assert torch.equal(result.weights["post_attention_layernorm.weight"], weights["post_attention_layernorm.weight"])
