"""config.json files as they lie on the hub, with what their makers left out, and checkpoints that name tensors
otherwise."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmopt.engine.config import EngineConfig
from llmopt.engine.scoring import Scorer
from llmopt.errors import InputError
from llmopt.model.architectures import config_from_gguf, config_from_hf, text_config
from llmopt.model.config import ModelConfig, Rope
from llmopt.model.source import open_source

GEMMA3_TEXT = {  # of gemma-3-4b-it
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "model_type": "gemma3_text",
    "num_hidden_layers": 34,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
}


def read(values: dict) -> ModelConfig:
    return config_from_hf(text_config(values, "config.json"), "config.json")


def test_gemma_3_inside_a_model_that_also_sees() -> None:
    config = read(
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "eos_token_id": [1, 106],
            "text_config": GEMMA3_TEXT,
            "vision_config": {"hidden_size": 1152},
        }
    )
    assert (config.architecture, config.num_heads, config.num_kv_heads, config.head_dim) == ("gemma3", 8, 4, 256)
    assert (config.vocab_size, config.max_position, config.tie_word_embeddings) == (262_208, 131_072, True)
    assert config.eos_token_ids == (1, 106)
    assert config.rope == Rope(1e6, "linear", 8.0)
    assert config.local_rope == Rope(1e4)
    assert config.windows[:7] == (1024,) * 5 + (None, 1024)
    assert config.attention_scale == 1 / 16
    assert config.activation == "gelu_tanh"
    assert config.logit_soft_cap is config.attention_soft_cap is None


def test_gemma_2_ties_its_head_where_nothing_is_said() -> None:
    config = read(
        {
            "architectures": ["Gemma2ForCausalLM"],
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "num_attention_heads": 16,
            "num_hidden_layers": 42,
            "num_key_value_heads": 8,
            "query_pre_attn_scalar": 224,
            "sliding_window": 4096,
            "vocab_size": 256000,
        }
    )
    assert config.tie_word_embeddings
    assert (config.attention_soft_cap, config.logit_soft_cap) == (50.0, 30.0)
    assert config.attention_scale == 224**-0.5
    assert config.windows[:3] == (4096, None, 4096)


def test_phi_3_of_128_thousand_tokens() -> None:
    values = {
        "architectures": ["Phi3ForCausalLM"],
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "su", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "vocab_size": 32064,
    }
    rope = read(values).rope
    assert (rope.kind, rope.original_max_position, rope.partial) == ("longrope", 4096, 1.0)
    assert rope.attention_factor == pytest.approx(1.1902380714)  # transformers' and vLLM's for this model
    shorter = values | {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 47}}
    with pytest.raises(InputError, match="47 long_factors for 48 frequencies"):
        read(shorter)
    partial = read(shorter | {"partial_rotary_factor": 0.75, "rope_scaling": None})  # as Phi-4-mini
    assert partial.rope.rotated(partial.head_dim) == 72


def test_mixtral_and_qwen3_moe() -> None:
    common = {"vocab_size": 1000, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4}
    mixtral = read({"architectures": ["MixtralForCausalLM"], **common, "intermediate_size": 96})
    assert mixtral.experts is not None
    assert (mixtral.experts.count, mixtral.experts.chosen, mixtral.experts.normalised) == (8, 2, True)
    assert mixtral.rope.theta == 1e6
    qwen = {
        "architectures": ["Qwen3MoeForCausalLM"],
        **common,
        "decoder_sparse_step": 2,
        "head_dim": 32,
        "intermediate_size": 6144,
        "max_window_layers": 3,
        "mlp_only_layers": [3],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "sliding_window": 16,
        "use_sliding_window": True,
    }
    config = read(qwen)
    assert config.experts is not None
    assert config.experts.layers == (False, True, False, False)
    assert config.experts.intermediate_size == 768
    assert config.windows == (16,) * 4  # unlike in Qwen3, max_window_layers counts for nothing
    assert config.layer_shapes(0)["mlp.gate_proj.weight"] == (6144, 64)
    assert config.layer_shapes(1)["mlp.experts.127.down_proj.weight"] == (64, 768)
    with pytest.raises(InputError, match="to 200 of 128 experts"):
        read(qwen | {"num_experts_per_tok": 200})


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"use_bidirectional_attention": True}, "encoder"),
        ({"hidden_activation": "relu"}, "gelu_pytorch_tanh"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "not supported"),
        ({"hidden_activation": ["silu"]}, "gelu_pytorch_tanh"),
        ({"hidden_activation": None}, "gelu_pytorch_tanh"),
        ({"query_pre_attn_scalar": None}, "query_pre_attn_scalar"),
        ({"query_pre_attn_scalar": 0}, "must be positive"),
        ({"final_logit_softcapping": -1}, "logit_soft_cap is -1.0; it must be positive"),
        ({"rope_parameters": {"full_attention": "linear"}}, "an object for each kind of layer"),
    ],
)
def test_what_is_not_known_is_refused(values: dict, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        read({"architectures": ["Gemma3ForCausalLM"], **GEMMA3_TEXT, **values})


def test_a_model_that_also_sees_needs_a_text_config() -> None:
    with pytest.raises(InputError, match="text_config"):
        read({"architectures": ["Gemma3ForConditionalGeneration"]})


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        ({"general.architecture": "gemma2"}, "'gemma2', which is not read from GGUF; known: qwen3, qwen2, llama"),
        ({"general.architecture": "llama", "llama.expert_count": 8}, "holds experts"),
    ],
)
def test_what_gguf_files_are_not_read(header: dict, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        config_from_gguf(header, "m.gguf", (), None)


def rewritten(folder: Path, target: Path, rename, **config) -> Path:
    """A copy of a checkpoint with other tensors; `rename` is given all of them."""
    target.mkdir()
    values = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(values | config))
    save_file(rename(load_file(folder / "model.safetensors")), target / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (target / name).write_bytes((folder / name).read_bytes())
    return target


def logits(model: Path) -> torch.Tensor:
    config = EngineConfig(model=str(model), backend="reference", max_model_len=64)
    return torch.cat(list(Scorer(config).logits(list(range(3, 40)))))


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_tensors_of_a_model_that_also_sees(prefix: str, tiny_model, tmp_path: Path) -> None:
    folder, _ = tiny_model("gemma3")

    def rename(tensors: dict) -> dict:
        return {name.replace("model.", prefix, 1): tensor for name, tensor in tensors.items()} | {
            "vision_tower.weight": torch.zeros(2, 2)
        }

    inner = json.loads((folder / "config.json").read_text())
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": inner}
    assert torch.equal(logits(rewritten(folder, tmp_path / "m", rename, **outer)), logits(folder))


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_experts_one_by_one_and_in_stacks(family: str, tiny_model, tmp_path: Path) -> None:
    """Checkpoints hold each expert's matrices alone; some that transformers 5 wrote hold those of all as one."""
    folder, model = tiny_model(family)
    single = load_file(folder / "model.safetensors")
    name = "block_sparse_moe.experts.4.w1" if family == "mixtral" else "mlp.experts.4.gate_proj"
    assert f"model.layers.0.{name}.weight" in single, "transformers writes other names than the hub has"
    stacked = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert any(tensor.dim() == 3 for tensor in stacked.values())
    whole = rewritten(folder, tmp_path / "m", lambda _: stacked)
    assert torch.equal(logits(whole), logits(folder))
    source = open_source(str(whole))
    assert (
        source.shape("model.layers.0.mlp.experts.2.up_proj.weight")
        == source.config.layer_shapes(0)["mlp.experts.2.up_proj.weight"]
    )


def test_fused_tensors_of_another_size_are_refused(tiny_model, tmp_path: Path) -> None:
    folder, _ = tiny_model("phi3")
    name = "model.layers.1.self_attn.qkv_proj.weight"
    longer = rewritten(folder, tmp_path / "m", lambda t: t | {name: torch.cat([t[name], t[name][:16]])})
    source = open_source(str(longer))
    for check in (source.layer, lambda layer: source.shape(f"model.layers.{layer}.self_attn.v_proj.weight")):
        with pytest.raises(InputError, match=r"qkv_proj.weight is \[144, 64\], but its config says 128"):
            check(1)
