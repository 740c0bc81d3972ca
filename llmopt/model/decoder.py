"""The decoder: embedding, layers, norm and head, over a backend's operations.

Nothing here knows how attention is cached: a layer is given a function that attends. Serving gives it the paged cache
(`PagedAttention`), calibration gives it whole sequences.
"""

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor

from llmopt.backend.base import Backend, DecoderParts, FusedDecoder, LayerParts, PagedBatch
from llmopt.backend.kv_cache import KVCache
from llmopt.model import rope
from llmopt.model.config import ModelConfig
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
"""The linear layers of a decoder layer, grouped by the input they share; the keys are attributes of DecoderLayer."""


def linear_names(config: ModelConfig) -> list[str]:
    """The full names of all linear layers of the decoder layers."""
    modules = [module for group in LINEAR_GROUPS.values() for module in group]
    return [layer_name(layer, module) for layer in range(config.num_layers) for module in modules]


class DecoderLayer:
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)).

    Its four linear operations are plain attributes, so that quantization replaces them and calibration wraps them
    from outside.
    """

    def __init__(self, config: ModelConfig, index: int, weights: Mapping[str, Weight], backend: Backend) -> None:
        self.config = config
        self.index = index
        self.backend = backend
        self.qkv = self._pack(weights, QKV)
        self.output = self._pack(weights, OUTPUT)
        self.gate_up = self._pack(weights, GATE_UP)
        self.down = self._pack(weights, DOWN)
        self.input_norm = self._place(weights["input_layernorm.weight"])
        self.mlp_norm = self._place(weights["post_attention_layernorm.weight"])
        if config.qk_norm:
            self.query_norm = self._place(weights["self_attn.q_norm.weight"])
            self.key_norm = self._place(weights["self_attn.k_norm.weight"])

    def _pack(self, weights: Mapping[str, Weight], names: tuple[str, ...]):
        biases = [weights.get(f"{name}.bias") for name in names]
        return self.backend.pack(
            [weights[f"{name}.weight"] for name in names], [None if b is None else as_dense(b) for b in biases]
        )

    def _place(self, weight: Weight) -> Tensor:
        return as_dense(weight).to(self.backend.device, self.backend.dtype)

    def __call__(self, x: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """x [T, hidden] to the same shape; rotation is `rope.angles` of the tokens' positions."""
        backend, eps = self.backend, self.config.rms_norm_eps
        queries, keys, values = self._split_heads(self.qkv(backend.rms_norm(x, self.input_norm, eps)))
        if self.config.qk_norm:
            queries = backend.rms_norm(queries, self.query_norm, eps)
            keys = backend.rms_norm(keys, self.key_norm, eps)
        attended = attend(self.index, backend.rope(queries, *rotation), backend.rope(keys, *rotation), values)
        x = x + self.output(attended.flatten(1))
        hidden = backend.silu_mul(self.gate_up(backend.rms_norm(x, self.mlp_norm, eps)))
        return x + self.down(hidden)

    def parts(self) -> LayerParts:
        return LayerParts(
            input_norm=self.input_norm,
            qkv=self.qkv,
            query_norm=self.query_norm if self.config.qk_norm else None,
            key_norm=self.key_norm if self.config.qk_norm else None,
            output=self.output,
            mlp_norm=self.mlp_norm,
            gate_up=self.gate_up,
            down=self.down,
            window=self.config.windows[self.index],
        )

    def _split_heads(self, qkv: Tensor) -> list[Tensor]:
        config = self.config
        heads = qkv.unflatten(1, (-1, config.head_dim))
        return list(heads.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1))


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
        self.norm = source.final_norm.to(backend.device, backend.dtype)
        if config.tie_word_embeddings:  # one copy serves both, unless a kernel reads it quantized
            head = self.embedding if isinstance(embedding, Tensor) else embedding
        else:
            head = source.head
        self.head = backend.pack([head], [None])
        self.frequencies = rope.frequencies(config.rope, config.head_dim).to(backend.device)

    def fuse(self, blocks: int, block_size: int, cache_dtype: str) -> FusedDecoder | None:
        """This decoder as one operation with a paged cache, where the backend has one for it."""
        config = self.config
        parts = DecoderParts(
            layers=[layer.parts() for layer in self.layers],
            embedding=self.embedding,
            norm=self.norm,
            head=self.head,
            frequencies=self.frequencies,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            eps=config.rms_norm_eps,
        )
        return self.backend.fuse(parts, blocks, block_size, cache_dtype)

    def hidden(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """The normed last hidden states [T, hidden] of tokens int64 [T] at positions int64 [T]."""
        x = F.embedding(tokens, self.embedding).to(self.backend.dtype)
        rotation = rope.angles(positions, self.frequencies)
        for layer in self.layers:
            x = layer(x, rotation, attend)
        return self.backend.rms_norm(x, self.norm, self.config.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [T, vocabulary] of hidden states [T, hidden]."""
        return self.head(hidden).float()


class PagedAttention:
    """Attention over the paged cache for the tokens of one step; an `Attend`."""

    def __init__(self, config: ModelConfig, backend: Backend, caches: list[KVCache], batch: PagedBatch) -> None:
        self.config = config
        self.backend = backend
        self.caches = caches
        self.batch = batch
        self.scale = config.head_dim**-0.5

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        cache = self.caches[layer]
        self.backend.write_kv(cache, keys, values, self.batch)
        return self.backend.attend(queries, cache, self.batch, self.scale, self.config.windows[layer])
