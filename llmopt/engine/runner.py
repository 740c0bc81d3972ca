"""Owns the model and its KV cache, and computes batches."""

import torch
from torch import Tensor

from llmopt.backend.kv_cache import KVCache
from llmopt.backend.select import select_backend
from llmopt.engine.batch import Batch
from llmopt.engine.cache_plan import CachePlan, block_bytes, plan_cache
from llmopt.engine.config import EngineConfig
from llmopt.model.config import ModelConfig
from llmopt.model.decoder import Decoder, PagedAttention
from llmopt.model.source import ModelSource
from llmopt.progress import Progress, silent


class Runner:
    """A loaded model on its backend, with one paged cache for all layers.

    Attributes:
        plan: the number of blocks and the longest request.
        cache_kind: what the KV cache holds, one of CACHE_DTYPES.
    """

    def __init__(
        self,
        source: ModelSource,
        config: EngineConfig,
        progress: Progress = silent,
        draft: ModelConfig | None = None,
        target: "Runner | None" = None,
    ) -> None:
        """With a `draft` beside it the cache leaves room for the draft's; with a `target` this is that draft, on the
        same backend and with a cache of as many blocks."""
        self.config = source.config
        self._draft = draft
        self._target = target
        if target is None:
            self.backend = select_backend(config.backend, config.device, config.dtype, config.threads)
        else:
            self.backend = target.backend  # its threads too: those of two pools would be in each other's way
        self.cache_kind = self._cache_kind(config, self.backend.cache_kind)
        self.plan = self._plan(config, self.cache_kind)
        with torch.inference_mode():
            self.decoder = Decoder(source, self.backend, progress)
            self.fused = self.decoder.fuse(self.plan.blocks, config.block_size, config.kv_cache_dtype)
            self.caches = [] if self.fused else self._allocate(config)
            self.decoder.limit(self.plan.max_model_len)

    def _allocate(self, config: EngineConfig) -> list[KVCache]:
        """A cache for each layer that the operations called one by one work on; auto is the dtype of activations."""
        self.cache_kind = self._cache_kind(config, str(self.backend.dtype).removeprefix("torch."))
        self.plan = self._plan(config, self.cache_kind)
        shape = (self.plan.blocks, config.block_size, self.config.num_kv_heads, self.config.head_dim)
        return [self.backend.kv_cache(self.cache_kind, *shape) for _ in range(self.config.num_layers)]

    def _plan(self, config: EngineConfig, kind: str) -> CachePlan:
        if self._target is None:
            return plan_cache(config, self.config, kind, self._draft)
        return CachePlan(self._target.plan.blocks, block_bytes(config, self.config, kind), self.config.max_position)

    @staticmethod
    def _cache_kind(config: EngineConfig, default: str) -> str:
        return default if config.kv_cache_dtype == "auto" else config.kv_cache_dtype

    @torch.inference_mode()
    def hidden(self, batch: Batch) -> Tensor:
        """The last hidden states [T, hidden] of a batch; its keys and values are in the cache afterwards."""
        if self.fused:
            return self.fused.hidden(batch.host)
        tokens, paged = batch.host.placed(self.backend.device)
        attention = PagedAttention(self.config, self.backend, self.caches, paged)
        return self.decoder.hidden(tokens, paged.positions, attention)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [n, vocabulary] of hidden states [n, hidden]."""
        return self.decoder.logits(hidden)

    def run(self, batch: Batch) -> Tensor:
        """Compute a step; float32 logits [len(batch.rows), vocabulary] for the tokens to sample."""
        if self.fused:
            return self.fused.logits(batch.host, batch.last_rows)
        return self.logits(self.hidden(batch)[batch.last_rows.tolist()])
