"""Owns the model and its KV cache, and computes batches."""

import torch
from torch import Tensor

from llmopt.backend.kv_cache import KVCache
from llmopt.backend.select import select_backend
from llmopt.engine.batch import Batch
from llmopt.engine.cache_plan import plan_cache
from llmopt.engine.config import EngineConfig
from llmopt.model.decoder import Decoder, PagedAttention
from llmopt.model.source import ModelSource
from llmopt.progress import Progress, silent


class Runner:
    """A loaded model on its backend, with one paged cache for all layers.

    Attributes:
        plan: the number of blocks and the longest request.
    """

    def __init__(self, source: ModelSource, config: EngineConfig, progress: Progress = silent) -> None:
        self.backend = select_backend(config.backend, config.device, config.dtype, config.threads)
        self.config = source.config
        self.plan = plan_cache(config, self.config, self._cache_kind(config, self.backend.cache_kind))
        with torch.inference_mode():
            self.decoder = Decoder(source, self.backend, progress)
            self.fused = self.decoder.fuse(self.plan.blocks, config.block_size, config.kv_cache_dtype)
            self.caches = [] if self.fused else self._allocate(config)
            self.decoder.limit(self.plan.max_model_len)

    def _allocate(self, config: EngineConfig) -> list[KVCache]:
        """A cache for each layer that the operations called one by one work on; auto is the dtype of activations."""
        kind = self._cache_kind(config, str(self.backend.dtype).removeprefix("torch."))
        self.plan = plan_cache(config, self.config, kind)
        shape = (self.plan.blocks, config.block_size, self.config.num_kv_heads, self.config.head_dim)
        return [self.backend.kv_cache(kind, *shape) for _ in range(self.config.num_layers)]

    @staticmethod
    def _cache_kind(config: EngineConfig, default: str) -> str:
        return default if config.kv_cache_dtype == "auto" else config.kv_cache_dtype

    @torch.inference_mode()
    def hidden(self, batch: Batch) -> Tensor:
        """The last hidden states [T, hidden] of a batch; its keys and values are in the cache afterwards."""
        if self.fused:
            return self.fused.hidden(batch.tokens, batch.paged)
        attention = PagedAttention(self.config, self.backend, self.caches, batch.paged)
        return self.decoder.hidden(batch.tokens, batch.paged.positions, attention)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [n, vocabulary] of hidden states [n, hidden]."""
        return self.decoder.logits(hidden)

    def run(self, batch: Batch) -> Tensor:
        """Compute a step; float32 logits [len(batch.sampling), vocabulary] for the tokens to sample."""
        if self.fused:
            return self.fused.logits(batch.tokens, batch.paged, batch.last_rows)
        hidden = self.hidden(batch)
        return self.logits(hidden[batch.last_rows])
