"""The families that the decoder can run. A new one is an entry in this table and, at most, one small class."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llmopt.errors import InputError
from llmopt.model.config import Activation, ExpertsConfig, Fields, ModelConfig, token_ids
from llmopt.model.gguf_tokenizer import gguf_eos_ids
from llmopt.model.rope_config import rope_from_gguf, ropes_from_hf


@dataclass(frozen=True)
class Architecture:
    """How a family differs from Llama.

    Attributes:
        hf_class: the name in config.json's `architectures`.
        gguf_name: `general.architecture` in a GGUF file; None where the family is not read from or written to GGUF.
        multimodal_class: the name where the family is one part of a model that also sees; its config is `text_config`.
        defaults: what a config.json of the family may leave out, where that is not what it would be for Llama.
        qkv_bias: True where query, key and value always have biases; None where config.json's `attention_bias` says
            so, and then for the output projection too.
        qk_norm: queries and keys are normalised per head.
        windows: whether config.json's `sliding_window` counts: always, only with `use_sliding_window` (by layer, or on
            all layers), or never.
        full_every: each so-manieth layer has no window, where the config has no `layer_types`.
        gguf_permutes_qk: GGUF holds the rows of the query and key projections in pairs of neighbours instead of
            halves (see `gguf_names.py`).
        norm_offset, post_norms: see `ModelConfig`.
        scales_embedding: embeddings are multiplied by the square root of the hidden size.
        query_scale: config.json's `query_pre_attn_scalar` takes the place of the head size in the scale of attention.
        soft_caps: which of config.json's caps count.
        local_rope: layers with windows have a rotation of their own.
        partial_rope: config.json's `partial_rotary_factor` counts.
        experts: the layers may have experts.
        fused: checkpoints hold query, key and value as one tensor, and gate and up.
        renamed: parts of parameters' names that are others in a checkpoint (see `hf_names.py`).
    """

    name: str
    hf_class: str
    gguf_name: str | None = None
    multimodal_class: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    qkv_bias: bool | None = None
    qk_norm: bool = False
    windows: Literal["always", "opt-in", "opt-in-everywhere", "never"] = "never"
    full_every: int | None = None
    gguf_permutes_qk: bool = False
    norm_offset: float = 0.0
    post_norms: bool = False
    scales_embedding: bool = False
    query_scale: bool = False
    soft_caps: tuple[str, ...] = ()
    local_rope: bool = False
    partial_rope: bool = False
    experts: bool = False
    fused: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)


_GEMMA = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_GEMMA2 = _GEMMA | {
    "vocab_size": 256_000,
    "max_position_embeddings": 8192,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA3 = _GEMMA | {"vocab_size": 262_208, "max_position_embeddings": 131_072}
_MIXTRAL = {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "num_local_experts": 8, "num_experts_per_tok": 2}
_MIXTRAL_NAMES = {"mlp.": "block_sparse_moe.", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("llama", "LlamaForCausalLM", "llama", gguf_permutes_qk=True),
        Architecture("mistral", "MistralForCausalLM", "llama", windows="always", gguf_permutes_qk=True),
        Architecture("qwen2", "Qwen2ForCausalLM", "qwen2", qkv_bias=True, windows="opt-in"),
        Architecture("qwen3", "Qwen3ForCausalLM", "qwen3", qk_norm=True, windows="opt-in"),
        Architecture(
            "phi3",
            "Phi3ForCausalLM",
            defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
            windows="always",
            partial_rope=True,
            fused=True,
        ),
        Architecture(
            "gemma2",
            "Gemma2ForCausalLM",
            defaults=_GEMMA2,
            windows="always",
            full_every=2,
            norm_offset=1.0,
            post_norms=True,
            scales_embedding=True,
            query_scale=True,
            soft_caps=("attn_logit_softcapping", "final_logit_softcapping"),
        ),
        Architecture(
            "gemma3",
            "Gemma3ForCausalLM",
            multimodal_class="Gemma3ForConditionalGeneration",
            defaults=_GEMMA3,
            qk_norm=True,
            windows="always",
            full_every=6,
            norm_offset=1.0,
            post_norms=True,
            scales_embedding=True,
            query_scale=True,
            soft_caps=("final_logit_softcapping",),  # its attention has none, whatever its config says
            local_rope=True,
        ),
        Architecture(
            "mixtral",
            "MixtralForCausalLM",
            defaults=_MIXTRAL | {"norm_topk_prob": True},
            windows="always",
            experts=True,
            renamed=_MIXTRAL_NAMES,
        ),
        Architecture("qwen3_moe", "Qwen3MoeForCausalLM", qk_norm=True, windows="opt-in-everywhere", experts=True),
    )
}
_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def text_config(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The part of a config.json that describes the decoder, as a config.json of its own.

    Of a model that also sees, that is its `text_config`. Raises InputError where that is missing.
    """
    classes = values.get("architectures")
    name = classes[0] if isinstance(classes, list) and classes else None
    architecture = next((a for a in ARCHITECTURES.values() if name is not None and name == a.multimodal_class), None)
    if architecture is None:
        return dict(values)
    inner = values.get("text_config")
    if not isinstance(inner, dict):
        raise InputError(f"{where}: a {name} needs a text_config, which describes the part that is run")
    outer = {
        key: values[key]
        for key in ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "tie_word_embeddings")
        if values.get(key) is not None
    }
    return {**inner, **outer, "architectures": [architecture.hf_class]}


def config_from_hf(values: Mapping[str, Any], where: str) -> ModelConfig:
    """Read what `text_config` gives. Raises InputError for an unknown architecture or a value that makes no sense."""
    architecture = _find(values.get("architectures"), where)
    values = {**architecture.defaults, **values}
    fields = Fields(values, where)
    if values.get("use_bidirectional_attention"):
        raise InputError(f"{where}: use_bidirectional_attention makes an encoder of the model; decoders are supported")
    heads = fields.integer("num_attention_heads")
    layers = fields.integer("num_hidden_layers")
    hidden = fields.integer("hidden_size")
    attention_bias = fields.boolean("attention_bias", False)
    rope, local_rope = ropes_from_hf(values, where, local=architecture.local_rope, partial=architecture.partial_rope)
    return ModelConfig(
        architecture=architecture.name,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=fields.integer("head_dim", hidden // max(heads, 1)),
        max_position=fields.integer("max_position_embeddings", 2048),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=rope,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        windows=_windows(architecture, values, layers, where),
        qkv_bias=attention_bias if architecture.qkv_bias is None else architecture.qkv_bias,
        output_bias=attention_bias and architecture.qkv_bias is None,
        mlp_bias=fields.boolean("mlp_bias", False),
        qk_norm=architecture.qk_norm,
        activation=_activation(architecture, values, where),
        norm_offset=architecture.norm_offset,
        post_norms=architecture.post_norms,
        embedding_scale=hidden**0.5 if architecture.scales_embedding else None,
        attention_scale=_attention_scale(fields) if architecture.query_scale else None,
        attention_soft_cap=_soft_cap(architecture, fields, "attn_logit_softcapping"),
        logit_soft_cap=_soft_cap(architecture, fields, "final_logit_softcapping"),
        local_rope=local_rope,
        experts=_experts(fields, layers) if architecture.experts else None,
        bos_token_id=values.get("bos_token_id"),
        eos_token_ids=token_ids(values.get("eos_token_id"), where),
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """A config.json for a model that came without one; of a family that GGUF knows."""
    window = next((w for w in config.windows if w is not None), None)
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.architecture].hf_class],
        "model_type": config.architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.rms_norm_eps,
        # Readers older than transformers 5 know rope_theta and rope_scaling, newer ones rope_parameters.
        "rope_theta": config.rope.theta,
        "rope_scaling": None if config.rope.kind == "default" else config.rope.to_hf(),
        "rope_parameters": config.rope.to_hf(),
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.output_bias,
        "mlp_bias": config.mlp_bias,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_ids[0] if len(config.eos_token_ids) == 1 else list(config.eos_token_ids),
    }
    if window is not None:
        values |= {"sliding_window": window, "use_sliding_window": True}
        values["layer_types"] = ["full_attention" if w is None else "sliding_attention" for w in config.windows]
    return values


def config_from_gguf(
    metadata: Mapping[str, Any], where: str, tensors: Collection[str], rope_factors: list[float] | None
) -> ModelConfig:
    """Read a GGUF header. `tensors` are the names of its tensors, which tell what it has biases for and whether head
    and embedding are tied; `rope_factors` is the content of its `rope_freqs` tensor, where it has one."""
    name = metadata.get("general.architecture")
    known = {a.gguf_name: a for a in reversed(ARCHITECTURES.values()) if a.gguf_name is not None}
    if name not in known:
        raise InputError(f"{where} holds the architecture {name!r}, which is not read from GGUF; known: "
                         f"{', '.join(known)}. Of other families give the Hugging Face folder")  # fmt: skip
    if metadata.get(f"{name}.expert_count"):
        raise InputError(f"{where} holds experts, which are not read from GGUF: give the model's Hugging Face folder")
    window = metadata.get(f"{name}.attention.sliding_window") or None
    # Mistral is Llama to GGUF; only Mistral has windows.
    architecture = ARCHITECTURES["mistral"] if name == "llama" and window is not None else known[name]
    prefix = f"{name}."
    fields = Fields({k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}, where)
    heads = fields.integer("attention.head_count")
    hidden = fields.integer("embedding_length")
    layers = fields.integer("block_count")
    theta = fields.number("rope.freq_base", 10000.0)
    return ModelConfig(
        architecture=architecture.name,
        vocab_size=len(metadata.get("tokenizer.ggml.tokens", ())) or fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("feed_forward_length"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=fields.integer("attention.head_count_kv", heads),
        head_dim=fields.integer("attention.key_length", hidden // max(heads, 1)),
        max_position=fields.integer("context_length"),
        rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon", 1e-6),
        rope=rope_from_gguf(fields, theta, rope_factors),
        tie_word_embeddings="output.weight" not in tensors,
        windows=(window,) * layers,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        qk_norm=architecture.qk_norm,
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=gguf_eos_ids(metadata),
    )


def _find(classes: Any, where: str) -> Architecture:
    known = {a.hf_class: a for a in ARCHITECTURES.values()}
    name = classes[0] if isinstance(classes, list) and classes else None
    if name not in known:
        raise InputError(f"{where} names the architecture {name!r}, which is not supported; known: {', '.join(known)}")
    return known[name]


def _activation(architecture: Architecture, values: Mapping[str, Any], where: str) -> Activation:
    gemma = "hidden_activation"
    name = values.get(gemma) if gemma in architecture.defaults else values.get("hidden_act", "silu")
    if name not in tuple(_ACTIVATIONS):  # a list, which a damaged file may hold, is no key
        raise InputError(f"{where}: the activation {name!r} is not supported; known: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _attention_scale(fields: Fields) -> float:
    scalar = fields.number("query_pre_attn_scalar")
    if scalar <= 0:
        raise InputError(f"{fields.where}: query_pre_attn_scalar must be positive, not {scalar:g}")
    return float(scalar**-0.5)


def _soft_cap(architecture: Architecture, fields: Fields, name: str) -> float | None:
    counts = name in architecture.soft_caps and fields.values.get(name) is not None
    return fields.number(name) if counts else None


def _experts(fields: Fields, layers: int) -> ExpertsConfig:
    name = "num_experts" if fields.values.get("num_experts") is not None else "num_local_experts"
    step = fields.integer("decoder_sparse_step", 1)
    dense = fields.values.get("mlp_only_layers") or []
    if step < 1 or not isinstance(dense, list):
        raise InputError(f"{fields.where}: decoder_sparse_step must be at least 1, and mlp_only_layers a list")
    count = fields.integer(name)
    return ExpertsConfig(
        layers=tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers)),
        count=count,
        chosen=fields.integer("num_experts_per_tok"),
        intermediate_size=fields.integer("moe_intermediate_size", fields.integer("intermediate_size")),
        normalised=fields.boolean("norm_topk_prob", False),
    )


def _windows(architecture: Architecture, values: Mapping[str, Any], layers: int, where: str) -> tuple[int | None, ...]:
    opted_in = architecture.windows.startswith("opt-in") and values.get("use_sliding_window") is True
    counts = architecture.windows == "always" or opted_in
    if not counts or values.get("sliding_window") is None:
        return (None,) * layers
    fields = Fields(values, where)
    window = fields.integer("sliding_window")
    first = fields.integer("max_window_layers", 0) if architecture.windows == "opt-in" else 0
    every = architecture.full_every and fields.integer("sliding_window_pattern", architecture.full_every)
    kinds = values.get("layer_types") if architecture.windows != "opt-in-everywhere" else None
    if not kinds:
        is_full = [i < first or (every is not None and (i + 1) % every == 0) for i in range(layers)]
        kinds = ["full_attention" if full else "sliding_attention" for full in is_full]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
