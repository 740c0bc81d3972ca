"""Mixes give tensors the types that llama-quantize gives them: the counts are those of files that it wrote."""

from collections import Counter

import pytest

from llmopt.weights.formats.gguf_mixes import FILE_TYPES, MIXES, tensor_type
from llmopt.weights.scheme import SCHEMES


def types(mix: str, layers: int, hidden: int, inner: int, tied: bool, grouped: bool) -> dict[str, str]:
    """The type of every matrix of a model, by name."""
    shapes = {"model.embed_tokens.weight": (None, hidden)} | ({} if tied else {"lm_head.weight": (None, hidden)})
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (layer, hidden) for name in "qkvo"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (layer, hidden) for name in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = layer, inner
    return {
        name: tensor_type(mix, name, layer, (8, width), layers=layers, tied=tied, grouped=grouped)
        for name, (layer, width) in shapes.items()
    }


SMOLLM2 = {"layers": 30, "hidden": 576, "inner": 1536, "tied": True, "grouped": True}
UNTIED = {"layers": 20, "hidden": 256, "inner": 512, "tied": False, "grouped": False}
LARGE = {"layers": 80, "hidden": 256, "inner": 512, "tied": False, "grouped": True}


@pytest.mark.parametrize(
    ("mix", "model", "expected"),
    [
        ("q4_0", SMOLLM2, {"Q4_0": 210, "Q8_0": 1}),
        ("q5_1", SMOLLM2, {"Q5_1": 210, "Q8_0": 1}),
        ("q8_0", SMOLLM2, {"Q8_0": 211}),
        ("q4_k_s", SMOLLM2, {"Q5_0": 176, "Q4_K": 27, "Q5_1": 4, "Q5_K": 3, "Q8_0": 1}),
        ("q4_k_m", SMOLLM2, {"Q5_0": 166, "Q4_K": 16, "Q8_0": 15, "Q6_K": 14}),
        ("q5_k_s", SMOLLM2, {"Q5_1": 180, "Q5_K": 30, "Q8_0": 1}),
        ("q5_k_m", SMOLLM2, {"Q5_1": 166, "Q5_K": 16, "Q8_0": 15, "Q6_K": 14}),
        ("q6_k", SMOLLM2, {"Q8_0": 181, "Q6_K": 30}),
        ("q4_0", UNTIED, {"Q4_0": 141, "Q6_K": 1}),
        ("q4_k_s", UNTIED, {"Q4_K": 135, "Q5_K": 6, "Q6_K": 1}),
        ("q4_k_m", UNTIED, {"Q4_K": 121, "Q6_K": 21}),
        ("q4_k_s", LARGE, {"Q4_K": 471, "Q5_K": 90, "Q6_K": 1}),
        ("q4_k_m", LARGE, {"Q4_K": 441, "Q6_K": 81, "Q5_K": 40}),
        ("q4_k_m", LARGE | {"grouped": False, "tied": True}, {"Q4_K": 480, "Q6_K": 81}),
        ("q5_k_m", LARGE, {"Q5_K": 481, "Q6_K": 81}),
    ],
)
def test_types_are_those_of_llama_quantize(mix, model, expected):
    assert Counter(types(mix, **model).values()) == expected


def test_the_layers_that_get_more_bits():
    found = types("q4_k_m", **UNTIED)
    downs = [layer for layer in range(20) if found[f"model.layers.{layer}.mlp.down_proj.weight"] == "Q6_K"]
    assert downs == [0, 1, 4, 7, 10, 13, 16, 17, 18, 19]
    assert all(found[f"model.layers.{layer}.self_attn.v_proj.weight"] == "Q6_K" for layer in downs)


def test_mxfp4_is_for_linear_layers():
    assert Counter(types("mxfp4", **SMOLLM2).values()) == {"MXFP4": 210, "Q8_0": 1}
    assert Counter(types("mxfp4", **UNTIED).values()) == {"MXFP4": 140, "Q8_0": 2}


@pytest.mark.parametrize("mix", MIXES)
def test_vectors_stay_in_32_bits_and_odd_rows_in_16(mix):
    def of(name, shape):
        return tensor_type(mix, name, 0, shape, layers=4, tied=False, grouped=False)

    assert of("input_layernorm.weight", (64,)) == "F32"
    assert of("self_attn.q_proj.bias", (64,)) == "F32"
    assert of("mlp.up_proj.weight", (64, 40)) in ("F16", "BF16")


def test_every_type_that_a_mix_names_can_be_made():
    named = {kind for mix in MIXES.values() for kind in (mix.usual, mix.head, mix.more, mix.embedding) if kind}
    assert named <= {scheme.gguf_type for scheme in SCHEMES.values()}


def test_every_gguf_scheme_has_a_number():
    assert {scheme.name for scheme in SCHEMES.values() if scheme.gguf_type} <= FILE_TYPES.keys()
