"""The families that the decoder can run. A new one is an entry in this table and, at most, one small class."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llmopt.errors import InputError
from llmopt.model.config import Fields, ModelConfig, Rope, token_ids
from llmopt.model.gguf_tokenizer import gguf_eos_ids


@dataclass(frozen=True)
class Architecture:
    """How a family differs from Llama.

    Attributes:
        hf_class: the name in config.json's `architectures`.
        gguf_name: `general.architecture` in a GGUF file.
        qkv_bias: True where query, key and value always have biases; None where config.json's `attention_bias` says
            so, and then for the output projection too.
        qk_norm: queries and keys are normalised per head.
        windows: whether config.json's `sliding_window` counts: always, only with `use_sliding_window`, or never.
        gguf_permutes_qk: GGUF holds the rows of the query and key projections in pairs of neighbours instead of
            halves (see `gguf_names.py`).
    """

    name: str
    hf_class: str
    gguf_name: str
    qkv_bias: bool | None = None
    qk_norm: bool = False
    windows: Literal["always", "opt-in", "never"] = "never"
    gguf_permutes_qk: bool = False


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("llama", "LlamaForCausalLM", "llama", gguf_permutes_qk=True),
        Architecture("mistral", "MistralForCausalLM", "llama", windows="always", gguf_permutes_qk=True),
        Architecture("qwen2", "Qwen2ForCausalLM", "qwen2", qkv_bias=True, windows="opt-in"),
        Architecture("qwen3", "Qwen3ForCausalLM", "qwen3", qk_norm=True, windows="opt-in"),
    )
}


def config_from_hf(values: Mapping[str, Any], where: str) -> ModelConfig:
    """Read a config.json. Raises InputError for an unknown architecture or a value that makes no sense."""
    architecture = _find(values.get("architectures"), where)
    fields = Fields(values, where)
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise InputError(f"{where}: the activation {values['hidden_act']!r} is not supported; silu is")
    heads = fields.integer("num_attention_heads")
    layers = fields.integer("num_hidden_layers")
    hidden = fields.integer("hidden_size")
    attention_bias = fields.boolean("attention_bias", False)
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
        rope=_rope_from_hf(values, where),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        windows=_windows(architecture, values, layers, where),
        qkv_bias=attention_bias if architecture.qkv_bias is None else architecture.qkv_bias,
        output_bias=attention_bias and architecture.qkv_bias is None,
        mlp_bias=fields.boolean("mlp_bias", False),
        qk_norm=architecture.qk_norm,
        bos_token_id=values.get("bos_token_id"),
        eos_token_ids=token_ids(values.get("eos_token_id"), where),
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """A config.json for a model that came without one."""
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
    known = {a.gguf_name: a for a in reversed(ARCHITECTURES.values())}
    if name not in known:
        raise InputError(f"{where} holds the architecture {name!r}, which is not supported; known: {', '.join(known)}")
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
        rope=_rope_from_gguf(fields, theta, rope_factors),
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


def _windows(architecture: Architecture, values: Mapping[str, Any], layers: int, where: str) -> tuple[int | None, ...]:
    opted_in = values.get("use_sliding_window") is True
    counts = architecture.windows == "always" or (architecture.windows == "opt-in" and opted_in)
    if not counts or values.get("sliding_window") is None:
        return (None,) * layers
    fields = Fields(values, where)
    window, first = fields.integer("sliding_window"), fields.integer("max_window_layers", 0)
    if architecture.windows == "always":
        first = 0
    kinds = values.get("layer_types") or ["sliding_attention" if i >= first else "" for i in range(layers)]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rope_from_hf(values: Mapping[str, Any], where: str) -> Rope:
    scaling = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise InputError(f"{where}: the rope scaling must be an object, not {scaling!r:.60}")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    fields = Fields({"rope_theta": values.get("rope_theta"), **scaling}, where)
    theta = fields.number("rope_theta", 10000.0)
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, "linear", fields.number("factor"))
    if kind == "llama3":
        return Rope(
            theta,
            "llama3",
            fields.number("factor"),
            fields.number("low_freq_factor"),
            fields.number("high_freq_factor"),
            fields.integer("original_max_position_embeddings"),
        )
    raise InputError(f"{where}: the rope scaling {kind!r} is not supported; known: default, linear, llama3")


def _rope_from_gguf(fields: Fields, theta: float, factors: list[float] | None) -> Rope:
    kind = fields.values.get("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise InputError(f"{fields.where}: the rope scaling {kind!r} is not supported; known: none, linear")
    if kind == "linear":
        return Rope(theta, "linear", fields.number("rope.scaling.factor"))
    if factors is None:
        return Rope(theta)
    # The file holds only the resulting divisors. The largest is the factor; the frequency bounds have been the same in
    # every Llama 3 release. Whoever builds the rotation checks it against the file's divisors.
    original = fields.integer("rope.scaling.original_context_length", Rope.original_max_position)
    return Rope(theta, "llama3", factor=round(max(factors), 4), original_max_position=original)
