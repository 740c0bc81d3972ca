"""What a decoder looks like, in one typed form, whether it came from a config.json or from a GGUF header."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llmopt.errors import InputError

RopeKind = Literal["default", "linear", "llama3"]


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base and how it is stretched for long contexts.

    `linear` divides every frequency by `factor` (Chen et al. 2023, arXiv:2306.15595). `llama3` divides the low ones
    only, with a ramp between the two wavelengths original_max_position / low_freq_factor and / high_freq_factor
    (Llama 3.1's release).
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def to_hf(self) -> dict[str, Any]:
        """The `rope_parameters` of a config.json."""
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
class ModelConfig:
    """The shape of a decoder.

    Attributes:
        architecture: key of the table in `architectures.py`.
        windows: for each layer the width of its sliding window in tokens, None for full attention.
        qkv_bias, output_bias, mlp_bias: which linear layers have biases.
        qk_norm: queries and keys are normalised per head before the rotation.
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
        if self.head_dim % 2:
            raise InputError(f"a head size of {self.head_dim} cannot be rotated: it must be even")
        if any(window is not None and window < 1 for window in self.windows):
            raise InputError("the model's sliding window must hold at least one token")
        if len(self.windows) != self.num_layers:
            raise InputError(f"{len(self.windows)} layer types for {self.num_layers} layers")

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter of a layer, by its name within the layer."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        linears = {
            "self_attn.q_proj": (q, hidden, self.qkv_bias),
            "self_attn.k_proj": (kv, hidden, self.qkv_bias),
            "self_attn.v_proj": (kv, hidden, self.qkv_bias),
            "self_attn.o_proj": (hidden, q, self.output_bias),
            "mlp.gate_proj": (inner, hidden, self.mlp_bias),
            "mlp.up_proj": (inner, hidden, self.mlp_bias),
            "mlp.down_proj": (hidden, inner, self.mlp_bias),
        }
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
        }
        for name, (rows, columns, has_bias) in linears.items():
            shapes[f"{name}.weight"] = (rows, columns)
            if has_bias:
                shapes[f"{name}.bias"] = (rows,)
        if self.qk_norm:
            shapes |= {"self_attn.q_norm.weight": (self.head_dim,), "self_attn.k_norm.weight": (self.head_dim,)}
        return shapes

    def linear_widths(self) -> set[int]:
        """How long the rows of linear layers are."""
        return {shape[1] for shape in self.layer_shapes().values() if len(shape) == 2}


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
