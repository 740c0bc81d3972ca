"""The decoder: embedding, layers, norm and head, over a backend's operations.

Nothing here knows how attention is cached: a layer is given a function that attends. Serving gives it the paged cache
(`PagedAttention`), calibration gives it whole sequences.
"""

import re
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from llmopt.backend.base import Backend, DecoderParts, FusedDecoder, LayerParts, Linear, PagedBatch, Scores
from llmopt.backend.kv_cache import KVCache
from llmopt.model import rope
from llmopt.model.config import ROUTER, ModelConfig
from llmopt.model.experts import mix
from llmopt.model.source import ModelSource, as_dense, layer_name
from llmopt.progress import Progress, silent
from llmopt.weights.quantized import Weight

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""attend(layer, queries [T, heads, d], keys [T, kv_heads, d], values) -> [T, heads, d]"""

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUTPUT = ("self_attn.o_proj",)
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
DOWN = ("mlp.down_proj",)
LINEAR_GROUPS = {"qkv": QKV, "output": OUTPUT, "gate_up": GATE_UP, "down": DOWN}
"""The linear layers of a decoder layer with one MLP, grouped by the input they share."""
FINE = ("qkv", "down")
"""Groups of linear layers whose inputs a backend that rounds activations rounds more finely: softmax multiplies what is
wrong with scores, and what gate and up make has the sharpest peaks."""
EXPERT = re.compile(r"mlp\.experts\.(\d+)\.down_proj\.weight")


def linear_groups(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The linear layers of a decoder layer whose parameters have these names, grouped by the input they share.

    With experts, the groups of the MLP are there for each: `experts.0.gate_up`, `experts.0.down`, `experts.1.gate_up`
    and so on.
    """
    experts = sorted(int(match[1]) for match in map(EXPERT.fullmatch, names) if match)
    if not experts:
        return LINEAR_GROUPS
    groups = {"qkv": QKV, "output": OUTPUT}
    for expert in experts:
        for group, members in (("gate_up", GATE_UP), ("down", DOWN)):
            groups[f"experts.{expert}.{group}"] = tuple(
                member.replace("mlp.", f"mlp.experts.{expert}.", 1) for member in members
            )
    return groups


def config_groups(config: ModelConfig, layer: int) -> dict[str, tuple[str, ...]]:
    """`linear_groups` of one layer of a model."""
    return linear_groups(config.layer_shapes(layer))


def linear_names(config: ModelConfig) -> list[str]:
    """The full names of all linear layers of the decoder layers."""
    return [
        layer_name(layer, module)
        for layer in range(config.num_layers)
        for group in config_groups(config, layer).values()
        for module in group
    ]


class DecoderLayer:
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)); where there are experts, they are the MLP.

    Its linear operations are a plain dictionary, `linears`, by the keys of `linear_groups`, so that quantization
    replaces them and calibration wraps them from outside.
    """

    def __init__(self, config: ModelConfig, index: int, weights: Mapping[str, Weight], backend: Backend) -> None:
        self.config = config
        self.index = index
        self.backend = backend
        self.linears = {
            group: self._pack(weights, members, fine=group.rpartition(".")[2] in FINE)
            for group, members in linear_groups(weights).items()
        }
        self.input_norm = self._norm(weights, "input_layernorm")
        self.mlp_norm = self._norm(weights, config.mlp_norm)
        if config.qk_norm:
            self.query_norm = self._norm(weights, "self_attn.q_norm")
            self.key_norm = self._norm(weights, "self_attn.k_norm")
        if config.post_norms:
            self.attention_post_norm = self._norm(weights, "post_attention_layernorm")
            self.mlp_post_norm = self._norm(weights, "post_feedforward_layernorm")
        if config.has_experts(index):
            self.router = as_dense(weights[ROUTER]).to(backend.device, backend.dtype)

    def _pack(self, weights: Mapping[str, Weight], names: tuple[str, ...], fine: bool = False) -> Linear:
        biases = [weights.get(f"{name}.bias") for name in names]
        return self.backend.pack(
            [weights[f"{name}.weight"] for name in names], [None if b is None else as_dense(b) for b in biases], fine
        )

    def _norm(self, weights: Mapping[str, Weight], name: str) -> Tensor:
        return place_norm(as_dense(weights[f"{name}.weight"]), self.config, self.backend)

    def __call__(self, x: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """x [T, hidden] to the same shape; rotation is `rope.angles` of the tokens' positions."""
        backend, config = self.backend, self.config
        attended = self._attention(backend.rms_norm(x, self.input_norm, config.rms_norm_eps), rotation, attend)
        if config.post_norms:
            attended = backend.rms_norm(attended, self.attention_post_norm, config.rms_norm_eps)
        x = x + attended
        made = self._mlp(backend.rms_norm(x, self.mlp_norm, config.rms_norm_eps))
        if config.post_norms:
            made = backend.rms_norm(made, self.mlp_post_norm, config.rms_norm_eps)
        return x + made

    def _attention(self, x: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        backend, eps = self.backend, self.config.rms_norm_eps
        queries, keys, values = self._split_heads(self.linears["qkv"](x))
        if self.config.qk_norm:
            queries = backend.rms_norm(queries, self.query_norm, eps)
            keys = backend.rms_norm(keys, self.key_norm, eps)
        attended = attend(self.index, backend.rope(queries, *rotation), backend.rope(keys, *rotation), values)
        return self.linears["output"](attended.flatten(1))

    def _mlp(self, x: Tensor) -> Tensor:
        experts = self.config.experts
        if experts is None or not experts.layers[self.index]:
            return self._gated(x)
        return mix(x, self.router, experts, lambda expert, tokens: self._gated(tokens, f"experts.{expert}."))

    def _gated(self, x: Tensor, prefix: str = "") -> Tensor:
        """down(activation(gate(x)) · up(x)) of the linear groups whose names begin with the prefix."""
        hidden = self.backend.gate(self.linears[f"{prefix}gate_up"](x), self.config.activation)
        return self.linears[f"{prefix}down"](hidden)

    def parts(self) -> LayerParts:
        """What a fused decoder takes of a layer without extras."""
        return LayerParts(
            input_norm=self.input_norm,
            qkv=self.linears["qkv"],
            query_norm=self.query_norm if self.config.qk_norm else None,
            key_norm=self.key_norm if self.config.qk_norm else None,
            output=self.linears["output"],
            mlp_norm=self.mlp_norm,
            gate_up=self.linears["gate_up"],
            down=self.linears["down"],
            window=self.config.windows[self.index],
        )

    def _split_heads(self, qkv: Tensor) -> list[Tensor]:
        config = self.config
        heads = qkv.unflatten(1, (-1, config.head_dim))
        return list(heads.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1))


def place_norm(weight: Tensor, config: ModelConfig, backend: Backend) -> Tensor:
    """A norm's weight as the backend multiplies by it.

    Where the family adds an offset, the sum is kept in float32: in 16 bits it would lose what the weight alone has.
    """
    if config.norm_offset:
        return (weight.float() + config.norm_offset).to(backend.device)
    return weight.to(backend.device, backend.dtype)


def scale_embedding(x: Tensor, config: ModelConfig) -> Tensor:
    """Embeddings as the first layer takes them; the scale is rounded to their dtype, as Gemma was trained."""
    return x if config.embedding_scale is None else x * torch.tensor(config.embedding_scale, dtype=x.dtype)


class Decoder:
    """A whole model on one backend."""

    def __init__(self, source: ModelSource, backend: Backend, progress: Progress = silent) -> None:
        config = source.config
        self.config = config
        self.backend = backend
        self.layers = []
        for index in range(config.num_layers):
            progress("loading layers", index, config.num_layers)
            self.layers.append(DecoderLayer(config, index, source.layer(index), backend))
        embedding = source.embedding
        self.embedding = backend.embedding(embedding)
        self.norm = place_norm(source.final_norm, config, backend)
        if config.tie_word_embeddings:  # one copy serves both, unless a kernel reads it quantized
            head = self.embedding if isinstance(embedding, Tensor) else embedding
        else:
            head = source.head
        self.head = backend.pack([head], [None])
        self.limit(config.max_position)

    def limit(self, length: int) -> None:
        """Say how long a sequence may become at most, in tokens, which the rotations of longrope depend on."""
        self.frequencies = {
            each: rope.frequencies(each, self.config.head_dim, length).to(self.backend.device)
            for each in self.config.ropes()
        }

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that a step reads: all but the embedding's, of which it reads a row for each token."""
        linears = [self.head, *(linear for layer in self.layers for linear in layer.linears.values())]
        return sum(linear.nbytes for linear in linears)

    def fuse(self, blocks: int, block_size: int, cache_dtype: str) -> FusedDecoder | None:
        """This decoder as one operation with a paged cache, where the backend has one for it."""
        config = self.config
        parts = DecoderParts(
            layers=[] if config.extras() else [layer.parts() for layer in self.layers],
            embedding=self.embedding,
            norm=self.norm,
            head=self.head,
            frequencies=self.frequencies[config.rope],
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            eps=config.rms_norm_eps,
            extras=config.extras(),
        )
        return self.backend.fuse(parts, blocks, block_size, cache_dtype)

    def hidden(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """The normed last hidden states [T, hidden] of tokens int64 [T] at positions int64 [T]."""
        x = scale_embedding(F.embedding(tokens, self.embedding).to(self.backend.dtype), self.config)
        rotations = {each: rope.angles(positions, f, each.attention_factor) for each, f in self.frequencies.items()}
        for layer in self.layers:
            x = layer(x, rotations[self.config.layer_rope(layer.index)], attend)
        return self.backend.rms_norm(x, self.norm, self.config.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [T, vocabulary] of hidden states [T, hidden]."""
        logits, cap = self.head(hidden).float(), self.config.logit_soft_cap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


class PagedAttention:
    """Attention over the paged cache for the tokens of one step; an `Attend`."""

    def __init__(self, config: ModelConfig, backend: Backend, caches: list[KVCache], batch: PagedBatch) -> None:
        self.config = config
        self.backend = backend
        self.caches = caches
        self.batch = batch

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        cache = self.caches[layer]
        self.backend.write_kv(cache, keys, values, self.batch)
        config = self.config
        scores = Scores(config.softmax_scale, config.windows[layer], config.attention_soft_cap)
        return self.backend.attend(queries, cache, self.batch, scores)
