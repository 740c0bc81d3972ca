"""What a decoder looks like, in one typed form, whether it came from a config.json or from a GGUF header."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llmopt.errors import InputError

RopeKind = Literal["default", "linear", "llama3", "longrope"]
Activation = Literal["silu", "gelu_tanh"]
ROUTER = "mlp.gate.weight"
"""The name, within a layer, of the matrix that chooses among experts."""


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base and how it is stretched for long contexts.

    `linear` divides every frequency by `factor` (Chen et al. 2023, arXiv:2306.15595). `llama3` divides the low ones
    only, with a ramp between the two wavelengths original_max_position / low_freq_factor and / high_freq_factor
    (Llama 3.1's release). `longrope` divides each by a factor of its own, the long ones where sequences may be longer
    than original_max_position, else the short ones (Ding et al. 2024, arXiv:2402.13753).

    Attributes:
        partial: the share of each head that is rotated, its first channels.
        attention_factor: cosines and sines are multiplied by it.
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    partial: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0

    def rotated(self, head_dim: int) -> int:
        """How many channels of a head are rotated."""
        return int(head_dim * self.partial)

    def to_hf(self) -> dict[str, Any]:
        """The `rope_parameters` of a config.json, for what a GGUF file can say."""
        if self.kind == "default":
            return {"rope_type": "default", "rope_theta": self.theta}
        if self.kind == "linear":
            return {"rope_type": "linear", "rope_theta": self.theta, "factor": self.factor}
        return {
            "rope_type": "llama3",
            "rope_theta": self.theta,
            "factor": self.factor,
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
            "original_max_position_embeddings": self.original_max_position,
        }


@dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts in place of the MLP.

    Attributes:
        layers: for each layer of the model whether it has experts.
        count: how many there are in such a layer.
        chosen: to how many of them a token goes.
        intermediate_size: of each.
        normalised: the weights of those that are chosen are scaled to a sum of 1.
    """

    layers: tuple[bool, ...]
    count: int
    chosen: int
    intermediate_size: int
    normalised: bool

    def __post_init__(self) -> None:
        if not 1 <= self.chosen <= self.count:
            raise InputError(f"the model sends each token to {self.chosen} of {self.count} experts")
        if self.intermediate_size < 1:
            raise InputError(f"the experts' intermediate size is {self.intermediate_size}; it must be at least 1")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder.

    Attributes:
        architecture: key of the table in `architectures.py`.
        windows: for each layer the width of its sliding window in tokens, None for full attention.
        qkv_bias, output_bias, mlp_bias: which linear layers have biases.
        qk_norm: queries and keys are normalised per head before the rotation.
        activation: of the gate of the MLP; gelu_tanh is GELU's approximation by a hyperbolic tangent.
        norm_offset: what is added to every weight of a norm before it multiplies.
        post_norms: what attention and MLP make is normalised too, before it is added.
        embedding_scale: embeddings are multiplied by it; None for no scale.
        attention_scale: of the products of queries and keys, None for 1 / sqrt(head_dim).
        attention_soft_cap: c, where attention scores s become c · tanh(s / c); None for no cap.
        logit_soft_cap: the same for the logits.
        local_rope: the rotation in layers with a sliding window, None where it is that of the others.
        experts: None where every layer has one MLP.
        eos_token_ids: any of them ends a text.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float
    rope: Rope
    tie_word_embeddings: bool
    windows: tuple[int | None, ...]
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    activation: Activation = "silu"
    norm_offset: float = 0.0
    post_norms: bool = False
    embedding_scale: float | None = None
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    local_rope: Rope | None = None
    experts: ExpertsConfig | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"the model's {name} is {getattr(self, name)}; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise InputError(f"{self.num_heads} attention heads cannot share {self.num_kv_heads} key heads evenly")
        if any(rope.rotated(self.head_dim) % 2 for rope in self.ropes()):
            raise InputError(f"a head size of {self.head_dim} cannot be rotated: what is rotated must be even")
        rotated = self.rope.rotated(self.head_dim)
        if not 2 <= rotated <= self.head_dim:
            raise InputError(f"{rotated} channels of a head size of {self.head_dim} cannot be rotated")
        for name in ("short_factors", "long_factors"):
            factors = getattr(self.rope, name)
            if self.rope.kind == "longrope" and len(factors) != rotated // 2:
                raise InputError(f"longrope has {len(factors)} {name} for {rotated // 2} frequencies")
        for name in ("attention_scale", "attention_soft_cap", "logit_soft_cap"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise InputError(f"the model's {name} is {getattr(self, name)}; it must be positive")
        if any(window is not None and window < 1 for window in self.windows):
            raise InputError("the model's sliding window must hold at least one token")
        if len(self.windows) != self.num_layers:
            raise InputError(f"{len(self.windows)} layer types for {self.num_layers} layers")

    @property
    def softmax_scale(self) -> float:
        """What products of queries and keys are multiplied by."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def mlp_norm(self) -> str:
        """The name, within a layer, of the norm before the MLP."""
        return "pre_feedforward_layernorm" if self.post_norms else "post_attention_layernorm"

    def ropes(self) -> tuple[Rope, ...]:
        """The different rotations that there are."""
        return (self.rope,) if self.local_rope is None else (self.rope, self.local_rope)

    def layer_rope(self, layer: int) -> Rope:
        """The rotation of one layer."""
        return self.rope if self.local_rope is None or self.windows[layer] is None else self.local_rope

    def has_experts(self, layer: int) -> bool:
        return self.experts is not None and self.experts.layers[layer]

    def extras(self) -> tuple[str, ...]:
        """What this decoder does that a plain one, as Llama or Qwen3, does not; in words, for messages."""
        found = {
            f"the activation {self.activation}": self.activation != "silu",
            "norms after attention and MLP": self.post_norms,
            "scaled embeddings": self.embedding_scale is not None,
            "its own scale of attention": self.attention_scale not in (None, self.head_dim**-0.5),
            "soft-capped attention": self.attention_soft_cap is not None,
            "soft-capped logits": self.logit_soft_cap is not None,
            "rotations that differ by layer": self.local_rope is not None,
            "longrope": self.rope.kind == "longrope",
            "experts": self.experts is not None,
        }
        return tuple(what for what, there in found.items() if there)

    def layer_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter of a layer, by its name within the layer."""
        hidden = self.hidden_size
        norms = ["input_layernorm", "post_attention_layernorm"]
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if self.post_norms else []
        shapes: dict[str, tuple[int, ...]] = {f"{norm}.weight": (hidden,) for norm in norms}
        for name, (rows, columns, has_bias) in self._linears(layer).items():
            shapes[f"{name}.weight"] = (rows, columns)
            if has_bias:
                shapes[f"{name}.bias"] = (rows,)
        if self.experts is not None and self.has_experts(layer):
            shapes[ROUTER] = (self.experts.count, hidden)
        if self.qk_norm:
            shapes |= {"self_attn.q_norm.weight": (self.head_dim,), "self_attn.k_norm.weight": (self.head_dim,)}
        return shapes

    def _linears(self, layer: int) -> dict[str, tuple[int, int, bool]]:
        """Rows and columns of a layer's linear layers, and whether they have biases."""
        hidden = self.hidden_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        linears = {
            "self_attn.q_proj": (q, hidden, self.qkv_bias),
            "self_attn.k_proj": (kv, hidden, self.qkv_bias),
            "self_attn.v_proj": (kv, hidden, self.qkv_bias),
            "self_attn.o_proj": (hidden, q, self.output_bias),
        }
        prefixes, inner = ["mlp"], self.intermediate_size
        if self.experts is not None and self.has_experts(layer):
            prefixes = [f"mlp.experts.{expert}" for expert in range(self.experts.count)]
            inner = self.experts.intermediate_size
        for prefix in prefixes:
            linears[f"{prefix}.gate_proj"] = (inner, hidden, self.mlp_bias)
            linears[f"{prefix}.up_proj"] = (inner, hidden, self.mlp_bias)
            linears[f"{prefix}.down_proj"] = (hidden, inner, self.mlp_bias)
        return linears

    def linear_shape(self, module: str) -> tuple[int, int]:
        """Rows and columns of a decoder layer's linear layer, by its full name."""
        _, _, layer, within = module.split(".", 3)
        rows, columns, _ = self._linears(int(layer))[within]
        return rows, columns

    def linear_widths(self) -> set[int]:
        """How long the rows of linear layers are."""
        layers = range(self.num_layers)
        return {columns for layer in layers for _, columns, _ in self._linears(layer).values()}


class Fields:
    """Typed reading of a mapping that somebody else wrote; every complaint names the file and the key."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def integer(self, name: str, default: int | None = None) -> int:
        return self._typed(name, default, lambda v: isinstance(v, int) and not isinstance(v, bool), "a whole number")

    def number(self, name: str, default: float | None = None) -> float:
        return float(
            self._typed(name, default, lambda v: isinstance(v, int | float) and not isinstance(v, bool), "a number")
        )

    def boolean(self, name: str, default: bool) -> bool:
        return self._typed(name, default, lambda v: isinstance(v, bool), "true or false")

    def _typed(self, name: str, default: Any, accepts: Callable[[Any], bool], what: str) -> Any:
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise InputError(f"{self.where} does not say {name}")
            return default
        if not accepts(value):
            raise InputError(f"{self.where}: {name} must be {what}, not {value!r:.60}")
        return value


def token_ids(value: Any, where: str = "config.json") -> tuple[int, ...]:
    """End tokens as config files hold them: none, one or a list. Raises InputError for anything else."""
    ids = [] if value is None else value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(token, int) for token in ids):
        raise InputError(f"{where}: eos_token_id must be a token's number or a list of them, not {value!r:.60}")
    return tuple(ids)
