"""The methods against their definitions, on small matrices with correlated inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.model.decoder import LINEAR_GROUPS
from llmopt.quant.fit import fit_grid
from llmopt.quant.grid import grouped
from llmopt.quant.methods.awq import AWQ
from llmopt.quant.methods.base import InputStatistics, relative_error
from llmopt.quant.methods.gptq import GPTQ, Hessian, gptq
from llmopt.quant.methods.rtn import RoundToNearest, round_to_nearest
from llmopt.weights.scheme import SCHEMES, Scheme

SYMMETRIC = SCHEMES["w4a16"].with_group_size(16)
ASYMMETRIC = SCHEMES["w4a16-asym"].with_group_size(16)
HIDDEN, INNER, HEAD = 64, 96, 16


def all_of(scheme: Scheme, skip: frozenset[str] = frozenset()) -> dict[str, Scheme]:
    return {module: scheme for group in LINEAR_GROUPS.values() for module in group if module not in skip}


def inputs(width: int, tokens: int = 512, seed: int = 0) -> torch.Tensor:
    """Correlated, with a few channels much louder than the rest, as in real models."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    x = torch.randn(tokens, width, generator=generator) @ mixing
    x[:, ::13] *= 8
    return x


def statistics_of(x: torch.Tensor) -> InputStatistics:
    statistics = InputStatistics(x.shape[1])
    for part in x.split(100):
        statistics.add(part)
    return statistics


def layer(kv_rows: int = 32, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "self_attn.q_proj": (64, HIDDEN),
        "self_attn.k_proj": (kv_rows, HIDDEN),
        "self_attn.v_proj": (kv_rows, HIDDEN),
        "self_attn.o_proj": (HIDDEN, 64),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    weights = {f"{name}.weight": torch.randn(*shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
    return weights | {name: 1 + 0.1 * torch.randn(HIDDEN, generator=generator) for name in norms}


def layer_statistics() -> dict[str, InputStatistics]:
    widths = {"qkv": HIDDEN, "output": 64, "gate_up": HIDDEN, "down": INNER}
    return {group: statistics_of(inputs(width, seed=i)) for i, (group, width) in enumerate(widths.items())}


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["w4a16", "w4a16-asym", "w8a16"]),
    st.integers(1, 9),
    st.integers(1, 4),
    st.sampled_from([0.0, 1e-9, 1.0, 1e3]),
    st.integers(0, 10**6),
)
def test_rounding_is_never_further_off_than_half_a_step(
    name: str, rows: int, groups: int, size: float, seed: int
) -> None:
    scheme = SCHEMES[name].with_group_size(32)
    weight = torch.randn(rows, groups * 32, generator=torch.Generator().manual_seed(seed)) * size
    quantized = round_to_nearest(weight, scheme, fit_grid(grouped(weight, scheme), scheme))
    assert int(quantized.codes.max()) < 1 << scheme.bits
    step = quantized.scales.float().abs().repeat_interleave(32, dim=1)
    # The far end of the range may be cut by half a step more, where codes reach further down than up; and a zero
    # point is rounded too.
    assert ((quantized.dequantize() - weight).abs() <= 1.02 * step + 1e-12).all()


def test_a_searched_grid_is_no_worse_than_one_that_covers() -> None:
    weight = torch.randn(20, 128, generator=torch.Generator().manual_seed(3)) ** 3
    for scheme in (SYMMETRIC, ASYMMETRIC):
        groups = grouped(weight, scheme)
        losses = []
        for steps in (1, 20):
            grid = fit_grid(groups, scheme, steps=steps)
            losses.append((grid.values(grid.numbers(groups)) - groups).square().sum(-1))
        assert (losses[1] <= losses[0]).all()
        assert losses[1].sum() < 0.98 * losses[0].sum()


def test_importance_moves_the_grid_towards_what_matters() -> None:
    weight = torch.randn(30, 1, 32, generator=torch.Generator().manual_seed(5))
    importance = torch.ones(1, 32)
    importance[:, :4] = 100
    plain, weighted = (fit_grid(weight, ASYMMETRIC, given, steps=20) for given in (None, importance))
    errors = [(grid.values(grid.numbers(weight)) - weight).square()[..., :4].sum() for grid in (plain, weighted)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("scheme", [SYMMETRIC, ASYMMETRIC])
def test_gptq_beats_rounding_on_the_outputs(scheme, desc_act: bool) -> None:
    weight = layer()["mlp.gate_proj.weight"]
    statistics = statistics_of(inputs(HIDDEN))
    plain = relative_error(weight, round_to_nearest(weight, scheme), statistics)
    quantized = gptq(weight, Hessian(statistics.full_gram(), 0.01), scheme, desc_act)
    assert (quantized.group_index is not None) == desc_act
    assert relative_error(weight, quantized, statistics) < 0.6 * plain


def test_gptq_with_uncorrelated_inputs_is_rounding_on_its_grid() -> None:
    """With a diagonal Hessian no column can make up for another, so the nearest codes are the best ones."""
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(2))
    quantized = gptq(weight, Hessian(torch.eye(32), 0.01), SYMMETRIC, desc_act=False)
    grid = fit_grid(grouped(weight, SYMMETRIC), SYMMETRIC, torch.ones(2, 16), steps=20)
    assert torch.equal(quantized.codes, round_to_nearest(weight, SYMMETRIC, grid).codes)


def test_group_index_puts_loud_inputs_first() -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    gram = torch.diag(torch.arange(1.0, 33.0))
    index = gptq(weight, Hessian(gram, 0.01), SYMMETRIC, desc_act=True).group_index
    assert index is not None
    assert index.tolist() == [1] * 16 + [0] * 16


def test_an_input_that_was_never_seen_costs_nothing() -> None:
    x = inputs(HIDDEN)
    x[:, 5] = 0
    weight = layer()["mlp.gate_proj.weight"]
    quantized = gptq(weight, Hessian(statistics_of(x).full_gram(), 0.01), SYMMETRIC, desc_act=False)
    assert torch.equal(quantized.dequantize()[:, 5], torch.zeros(INNER))


def test_gptq_falls_back_where_the_hessian_is_broken() -> None:
    statistics = layer_statistics()
    statistics["down"].gram -= 1e6 * torch.eye(INNER)
    result = GPTQ().quantize_layer(layer(), all_of(SYMMETRIC), statistics)
    reports = {report.name: report for report in result.modules}
    assert reports["mlp.down_proj"].method == "rtn"
    assert "positive definite" in (reports["mlp.down_proj"].fallback or "")
    assert reports["mlp.up_proj"].fallback is None
    assert torch.isfinite(result.weights["mlp.down_proj.weight"].dequantize()).all()  # type: ignore[union-attr]


def test_awq_beats_rounding_on_the_outputs() -> None:
    weights, statistics = layer(), layer_statistics()
    errors = {}
    for method in (RoundToNearest(), AWQ(HEAD)):
        result = method.quantize_layer(weights, all_of(ASYMMETRIC), statistics)
        errors[method.name] = output_errors(weights, result.weights, statistics)
    for group in ("qkv", "gate_up", "down"):
        assert errors["awq"][group] < 0.8 * errors["rtn"][group]
    assert errors["awq"]["output"] < errors["rtn"]["output"]


def output_errors(before: dict, after: dict, statistics: dict[str, InputStatistics]) -> dict[str, float]:
    """The relative output error of each group, its weights brought back to the scale of the original inputs."""
    scales = {
        "qkv": before["input_layernorm.weight"] / after["input_layernorm.weight"],
        "gate_up": before["post_attention_layernorm.weight"] / after["post_attention_layernorm.weight"],
    }
    # The factors that the value and up projections took are what their rows shrank by, seen through their own inputs'.
    shrunk = {}
    for module, group in (("self_attn.v_proj", "qkv"), ("mlp.up_proj", "gate_up")):
        rows = after[f"{module}.weight"].dequantize() / scales[group]
        shrunk[module] = rows.norm(dim=1) / before[f"{module}.weight"].norm(dim=1)
    scales["down"] = 1 / shrunk["mlp.up_proj"]
    per_head = shrunk["self_attn.v_proj"].view(-1, 1, HEAD)
    scales["output"] = (1 / per_head).expand(-1, 64 // per_head.numel(), -1).flatten()
    errors = {}
    for group, members in LINEAR_GROUPS.items():
        old = torch.cat([before[f"{m}.weight"] for m in members])
        new = torch.cat([after[f"{m}.weight"].dequantize() / shrunk.get(m, torch.ones(1))[:, None] for m in members])
        gram = statistics[group].full_gram()
        difference = new / scales[group] - old
        errors[group] = float((difference @ gram * difference).sum() / (old @ gram * old).sum())
    return errors


@pytest.mark.parametrize("kv_rows", [64, 32])
def test_awq_folds_leave_the_function_as_it_was(kv_rows: int) -> None:
    """With 8 bits hardly anything is rounded, so the folded layer must compute what the original does."""
    weights, statistics = layer(kv_rows), layer_statistics()
    fine = SCHEMES["w8a16"].with_group_size(16)
    after = AWQ(HEAD).quantize_layer(weights, all_of(fine), statistics).weights
    dense = {name: w if isinstance(w, torch.Tensor) else w.dequantize() for name, w in after.items()}
    assert not torch.allclose(dense["self_attn.o_proj.weight"], weights["self_attn.o_proj.weight"], rtol=0.05)
    x = inputs(HIDDEN)[:50]
    for before_out, after_out in zip(mlp_and_values(weights, x), mlp_and_values(dense, x), strict=True):
        torch.testing.assert_close(after_out, before_out, atol=0.1 * float(before_out.std()), rtol=0.05)


def mlp_and_values(weights: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    normed = x * weights["post_attention_layernorm.weight"]
    gate, up = normed @ weights["mlp.gate_proj.weight"].T, normed @ weights["mlp.up_proj.weight"].T
    mlp = (torch.nn.functional.silu(gate) * up) @ weights["mlp.down_proj.weight"].T
    values = (x * weights["input_layernorm.weight"]) @ weights["self_attn.v_proj.weight"].T
    heads = values.unflatten(1, (-1, HEAD)).repeat_interleave(HIDDEN // values.shape[1], dim=1)
    return mlp, heads.flatten(1) @ weights["self_attn.o_proj.weight"].T


def test_skipped_layers_stay_as_they_are() -> None:
    weights, skip = layer(), frozenset({"self_attn.v_proj", "mlp.down_proj"})
    for method in (RoundToNearest(), GPTQ(), AWQ(HEAD)):
        scheme = ASYMMETRIC if method.name == "awq" else SYMMETRIC
        result = method.quantize_layer(weights, all_of(scheme, skip), layer_statistics())
        for name in skip:
            assert torch.equal(result.weights[f"{name}.weight"], weights[f"{name}.weight"])
        assert {report.name for report in result.modules}.isdisjoint(skip)
