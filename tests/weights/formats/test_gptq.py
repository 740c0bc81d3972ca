import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmopt.errors import InputError, LlmoptError
from llmopt.weights.formats import FORMATS, find_format
from llmopt.weights.formats.base import HEAD
from llmopt.weights.formats.gptq import GPTQ, V1, V2
from llmopt.weights.scheme import find_scheme


def field(words: torch.Tensor, position: int, bits: int) -> int:
    """Code number `position` of a stream of int32 words."""
    stream = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return stream >> (position * bits) & ((1 << bits) - 1)


def by_the_layout(tensors: dict[str, torch.Tensor], bits: int, version: str) -> torch.Tensor:
    """The weight [out, in] in float32, element by element from the documented layout."""
    qweight, qzeros, scales, g_idx = (tensors[f"m.{k}"] for k in ("qweight", "qzeros", "scales", "g_idx"))
    weight = torch.empty(qweight.shape[1], len(g_idx))
    for o in range(weight.shape[0]):
        for i in range(weight.shape[1]):
            zero = field(qzeros[g_idx[i]], o, bits) + (version == V1)
            weight[o, i] = scales[g_idx[i], o].float() * (field(qweight[:, o], i, bits) - zero)
    return weight


@st.composite
def cases(draw):
    bits = draw(st.sampled_from([2, 3, 4, 8]))
    step = 32 // math.gcd(32, bits)
    return {
        "out_features": step * draw(st.integers(1, 3)),
        "in_features": step * draw(st.integers(1, 4)),
        "group_size": draw(st.integers(1, 50)),
        "bits": bits,
        "symmetric": draw(st.booleans()),
        "act_order": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }


@given(cases())
def test_round_trip(weight, same, case) -> None:
    original = weight(**case)
    version = V1 if case["symmetric"] else V2
    written = GPTQ(case["bits"], case["group_size"], True, case["symmetric"], version)
    tensors = written.encode("m", original)
    same(find_format(written.config()).decode("m", tensors.__getitem__), original.plain_order())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_layout_is_the_documented_one(weight, bits: int, symmetric: bool) -> None:
    original = weight(32, 64, 16, bits, symmetric, act_order=True)
    written = GPTQ(bits, 16, True, symmetric, V1 if symmetric else V2)
    tensors = written.encode("m", original)
    assert torch.equal(by_the_layout(tensors, bits, written.version), original.dequantize())


def test_dtypes_and_symmetric_zeros(weight) -> None:
    tensors = GPTQ(4, 32, False, True, V1).encode("m", weight(16, 64, 32, 4, True))
    assert {name: (str(t.dtype), tuple(t.shape)) for name, t in tensors.items()} == {
        "m.qweight": ("torch.int32", (8, 16)),
        "m.qzeros": ("torch.int32", (2, 2)),
        "m.scales": ("torch.float16", (2, 16)),
        "m.g_idx": ("torch.int32", (64,)),
    }
    assert (tensors["m.qzeros"] == 0x77777777).all()
    assert all(t.is_contiguous() for t in tensors.values())


def test_version_1_reads_what_auto_gptq_wrote_for_asymmetric_weights(weight, same) -> None:
    original = weight(16, 64, 32, 4, False)
    original = replace(original, zeros=original.zeros.clamp(min=1))
    tensors = GPTQ(4, 32, False, False, V1).encode("m", original)
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
    same(find_format(config).decode("m", tensors.__getitem__), original)


def test_version_1_cannot_hold_a_zero_point_of_0(weight) -> None:
    original = weight(16, 64, 32, 4, False)
    original.zeros[3, 1] = 0
    with pytest.raises(LlmoptError, match="zero point of 0"):
        GPTQ(4, 32, False, False, V1).encode("m", original)
    assert int(GPTQ(4, 32, False, False, V2).encode("m", original)["m.qzeros"].numel()) == 4


@pytest.mark.parametrize("key", ["checkpoint_format", "format"])
def test_either_key_names_the_version(key: str) -> None:
    read = find_format({"quant_method": "gptq", "bits": 4, "group_size": 64, key: "gptq_v2"})
    assert read.version == V2


def test_transformers_reads_the_config() -> None:
    from transformers import GPTQConfig

    schemes = {"m": find_scheme("w4a16").with_group_size(64)}
    config = FORMATS["gptq"].for_schemes(schemes, desc_act=True, damp=0.05).config()
    read = GPTQConfig.from_dict(config)
    assert (read.bits, read.group_size, read.desc_act, read.sym, read.damp_percent) == (4, 64, True, True, 0.05)


def scheme(name: str, group_size: int = 32):
    return find_scheme(name).with_group_size(group_size)


def test_modules_left_out_are_named_for_the_runtimes(weight) -> None:
    left_out = "model.layers.1.mlp.down_proj"
    written = GPTQ.for_schemes({"model.layers.0.mlp.down_proj": scheme("w4a16"), left_out: find_scheme("f16")})
    config = written.config()
    assert config["lm_head"] is False
    assert config["dynamic"] == {r"-:^model\.layers\.1\.mlp\.down_proj$": {}}
    assert find_format(config) == written
    with pytest.raises(InputError, match="leaves it out"):
        written.encode(left_out, weight(16, 64, 32, 4, True))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_width_is_written_alone(weight, same, bits: int, symmetric: bool) -> None:
    written = GPTQ.for_schemes({"m": scheme(f"w{bits}a16{'' if symmetric else '-asym'}")})
    assert written.version == (V1 if symmetric else V2)
    original = weight(32, 64, 32, bits, symmetric)
    same(find_format(written.config()).decode("m", written.encode("m", original).__getitem__), original)


MIXED = {
    "layers.0.q_proj": scheme("w8a16", 64),
    "layers.0.k_proj": scheme("w8a16", 64),
    "layers.0.v_proj": scheme("w8a16", 64),
    "layers.0.gate_proj": scheme("w4a16"),
    "layers.0.up_proj": scheme("w3a16"),
    "layers.0.down_proj": scheme("w4a16-asym"),
    "layers.1.q_proj": find_scheme("bf16"),
    "layers.1.down_proj": scheme("w4a16"),
    "layers.10.gate_proj": scheme("w4a16"),
    "layers.10.down_proj": scheme("w4a16"),
}


def test_modules_may_differ(weight, same) -> None:
    written = GPTQ.for_schemes(MIXED)
    assert (written.bits, written.group_size, written.sym, written.version) == (4, 32, True, V2)
    assert written.config()["dynamic"] == {
        r"-:^layers\.1\.q_proj$": {},
        r"+:^layers\.0\.(q_proj|k_proj|v_proj|qkv_proj)$": {"bits": 8, "group_size": 64, "sym": True},
        r"+:^layers\.0\.up_proj$": {"bits": 3, "group_size": 32, "sym": True},
        r"+:^layers\.0\.down_proj$": {"bits": 4, "group_size": 32, "sym": False},
    }
    read = find_format(written.config())
    assert read == written
    for seed, (module, its) in enumerate(MIXED.items()):
        if its.is_dense:
            continue
        original = weight(32, 64, its.group_size, its.bits, its.symmetric, seed=seed)
        tensors = written.encode(module, original)
        same(read.decode(module, tensors.__getitem__), original)
        with pytest.raises(LlmoptError, match="settings say"):
            written.encode(module, weight(32, 64, its.group_size, 2, its.symmetric))


@pytest.mark.parametrize("name", ["w8a16", "w4a16-asym", "w4a16"])
def test_the_head_has_a_rule_where_it_differs(weight, same, name: str) -> None:
    its = scheme(name)
    written = GPTQ.for_schemes({"layers.0.q_proj": scheme("w4a16"), "layers.0.down_proj": scheme("w4a16"), HEAD: its})
    config = written.config()
    rule = {"bits": its.bits, "group_size": 32, "sym": its.symmetric}
    assert config["lm_head"] is True
    assert config.get("dynamic") == (None if name == "w4a16" else {r"+:^lm_head$": rule})
    read = find_format(config)
    assert read == written
    original = weight(64, 64, 32, its.bits, its.symmetric)
    tensors = read.encode(HEAD, original)
    assert read.holds(HEAD, tensors)
    same(read.decode(HEAD, tensors.__getitem__), original)


def test_vllm_finds_the_same_settings_by_the_names_of_its_fused_layers() -> None:
    """vLLM takes the first pattern that matches `qkv_proj`, from the beginning of the name."""
    dynamic = GPTQ.for_schemes(MIXED).config()["dynamic"]
    matching = [rule for key, rule in dynamic.items() if re.match(key[2:], "layers.0.qkv_proj")]
    assert matching == [{"bits": 8, "group_size": 64, "sym": True}]
    assert not any(re.match(key[2:], "layers.0.gate_up_proj") for key in dynamic)


def test_rules_of_gptqmodel_are_read_in_order() -> None:
    dynamic = {"-:.*skip": {}, ".*down_proj": {"bits": 8, "mse": 2.0}, "+:.*proj": {"sym": False, "desc_act": True}}
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "dynamic": dynamic}
    assert find_format(config | {"lm_head": None}) == find_format(config)
    read = find_format(config)
    assert read.settings("a.down_proj") == GPTQ(8, 32, False, True, V1)
    assert read.settings("a.up_proj") == GPTQ(4, 32, True, False, V1)
    assert read.settings("a.other") == GPTQ(4, 32, False, True, V1)
    with pytest.raises(InputError, match="leaves it out"):
        read.settings("a.skip_proj")


def test_nothing_to_quantize_is_refused() -> None:
    with pytest.raises(InputError, match="nothing is left"):
        GPTQ.for_schemes({"m": find_scheme("f16")})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": torch.full((16, 2), 1e6)}, "float16"),
        ({"scales": torch.full((16, 2), float("nan"))}, "float16"),
        ({"bits": 8}, "8 bits"),
        ({"minimums": torch.ones(16, 2)}, "asymmetric"),
        ({"zeros": torch.ones(16, 2, dtype=torch.uint8)}, "asymmetric"),
        ({"group_index": torch.zeros(64, dtype=torch.int32)}, "group index"),
        ({"scales": torch.ones(16, 4)}, "4 groups"),
    ],
)
def test_what_the_checkpoint_cannot_hold_is_refused(weight, change, message) -> None:
    with pytest.raises(LlmoptError, match=message):
        GPTQ(4, 32, False, True, V1).encode("m", replace(weight(16, 64, 32, 4, True), **change))


def test_shapes_that_do_not_fill_words_are_refused(weight) -> None:
    with pytest.raises(LlmoptError, match="do not pack"):
        GPTQ(4, 32, False, True, V1).encode("m", weight(12, 64, 32, 4, True))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("qweight", torch.zeros(8, 16)),
        ("qweight", torch.zeros(16, dtype=torch.int32)),
        ("qweight", torch.zeros(0, 16, dtype=torch.int32)),
        ("scales", torch.zeros(2, 15)),
        ("scales", torch.zeros(2, 16, dtype=torch.int32)),
        ("scales", torch.zeros(0, 16)),
        ("scales", torch.full((2, 16), float("nan"))),
        ("qzeros", torch.zeros(2, 3, dtype=torch.int32)),
        ("g_idx", torch.full((64,), 2, dtype=torch.int32)),
        ("g_idx", torch.full((64,), -1, dtype=torch.int32)),
        ("g_idx", torch.zeros(63, dtype=torch.int32)),
    ],
)
def test_damaged_modules_are_refused(weight, name: str, value: torch.Tensor) -> None:
    written = GPTQ(4, 32, False, True, V1)
    tensors = written.encode("m", weight(16, 64, 32, 4, True)) | {f"m.{name}": value}
    with pytest.raises(InputError, match=r"m\."):
        written.decode("m", tensors.__getitem__)


def test_an_8_bit_zero_point_of_256_is_refused(weight) -> None:
    written = GPTQ(8, 32, False, False, V1)
    tensors = GPTQ(8, 32, False, False, V2).encode("m", weight(16, 64, 32, 8, False))
    tensors["m.qzeros"].fill_(-1)
    with pytest.raises(InputError, match="256"):
        written.decode("m", tensors.__getitem__)


def test_only_modules_with_tensors_are_quantized() -> None:
    read = GPTQ(4, 32, False, True, V1)
    assert read.holds("a.b", {"a.b.qweight"})
    assert not read.holds("lm_head", {"lm_head.weight", "a.b.qweight"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "bits"),
        ({"bits": "4"}, "bits"),
        ({"bits": True}, "bits"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": None}, "group_size"),
        ({"checkpoint_format": "marlin"}, "marlin"),
        ({"format": "bitblas"}, "bitblas"),
        ({"pack_dtype": "int8"}, "pack_dtype"),
        ({"is_marlin_format": True}, "is_marlin_format"),
        ({"dynamic": {"+:.*down.*": {"bits": 5}}}, "dynamic.*bits"),
        ({"dynamic": {"+:.*down.*": {"group_size": 0}}}, "group_size is 0"),
        ({"dynamic": {"+:(a+)+": {}}}, "could take very long"),
        ({"dynamic": [".*"]}, "dynamic"),
        ({"sym": "yes"}, "sym"),
    ],
)
def test_configs_that_cannot_be_read_are_refused_by_name(change, message) -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    with pytest.raises(InputError, match=message) as caught:
        find_format(config | change)
    assert "\n" not in str(caught.value)
