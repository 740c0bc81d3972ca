"""The settings of an engine; each is a flag of `llmopt serve` with dashes for underscores."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from llmopt.engine.speculation.config import SpeculativeConfig
from llmopt.errors import InputError

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
DeviceName = Literal["auto", "cpu", "cuda"]
BackendName = Literal["auto", "reference", "cpu"]
KVCacheDTypeName = Literal["auto", "float32", "bfloat16", "float16", "int8", "fp8"]
SchedulingPolicyName = Literal["fcfs", "priority"]
BatchingName = Literal["continuous", "dynamic", "static"]
_CHOICES = {
    "device": DeviceName,
    "backend": BackendName,
    "dtype": DTypeName,
    "kv_cache_dtype": KVCacheDTypeName,
    "scheduling_policy": SchedulingPolicyName,
    "batching": BatchingName,
}
BATCHING_WINDOW = 100.0
"""The default of batching_window, in milliseconds."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of one engine.

    Attributes:
        model: a folder, a .gguf file, a hub id or a built-in name.
        device: auto takes CUDA where there is one.
        backend: auto takes the fastest that this machine has.
        dtype: of activations; auto is bfloat16 on a GPU. On a CPU with kernels, auto and bfloat16 round activations
            where they are multiplied, to 8 or 16 bits; float32 rounds nothing.
        kv_cache_dtype: auto is bfloat16 where activations are rounded, else the same as `dtype`. int8 has a scale for
            each token and head, fp8 (e4m3) none.
        kv_cache_memory_bytes: size of the block pool; None for what `max_num_seqs` requests of `max_model_len` need,
            at most an eighth of the free memory and 1 GiB.
        block_size: tokens in a block.
        max_model_len: prompt and output together; None for what the model and the block pool allow.
        max_num_seqs: requests that run at once.
        max_num_batched_tokens: the token budget of a step.
        chunked_prefill_size: tokens of prompts that a step takes in, at most, while streams decode in it; 0 for no
            limit but max_num_batched_tokens. None is 0 on a GPU, where a step of this size waits for memory anyway. On
            a CPU, where every token makes a step longer, it is a pace for long prompts alone, under which a step takes
            about two and a half times as long (`prefill_pace.py`).
        batching: continuous lets requests in at every step. static takes those that wait, at most max_num_seqs, and
            nobody else before all of them have ended; dynamic also waits for more of them first.
        batching_window: milliseconds that dynamic waits, at most, for a batch to fill; None for BATCHING_WINDOW.
        enable_prefix_caching: keep the keys and values of full blocks for requests that begin with the same tokens.
        scheduling_policy: fcfs serves requests as they come; priority those of the lowest `priority` first.
        speculative_config: how tokens are drafted that the model then verifies; None for not at all.
        threads: CPU threads; None for one a core.
        seed: seeds requests that bring none.
    """

    model: str
    device: DeviceName = "auto"
    backend: BackendName = "auto"
    dtype: DTypeName = "auto"
    kv_cache_dtype: KVCacheDTypeName = "auto"
    kv_cache_memory_bytes: int | None = None
    block_size: int = 16
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    chunked_prefill_size: int | None = None
    batching: BatchingName = "continuous"
    batching_window: float | None = None
    enable_prefix_caching: bool = True
    scheduling_policy: SchedulingPolicyName = "fcfs"
    speculative_config: SpeculativeConfig | None = None
    threads: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                raise InputError(f"{name} must be one of {', '.join(get_args(choices))}, not {getattr(self, name)!r}")
        for name in ("kv_cache_memory_bytes", "block_size", "max_model_len", "max_num_seqs", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, not {value}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise InputError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}), so that every running request can decode one token a step"
            )
        if self.chunked_prefill_size is not None and self.chunked_prefill_size < 0:
            raise InputError(
                f"chunked_prefill_size must be at least 1, or 0 for no limit, not {self.chunked_prefill_size}"
            )
        if self.batching_window is not None:
            if self.batching != "dynamic":
                raise InputError("batching_window is how long dynamic batching waits; it needs --batching dynamic")
            if not 0 <= self.batching_window < math.inf:
                raise InputError(f"batching_window must be at least 0 ms, not {self.batching_window}")

    @property
    def batching_window_s(self) -> float:
        return (BATCHING_WINDOW if self.batching_window is None else self.batching_window) / 1e3
