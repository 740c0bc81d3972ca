"""How large the paged KV cache is, and how long a request may then be."""

import logging
from dataclasses import dataclass

import psutil

from llmopt.backend.kv_cache import bytes_per_token
from llmopt.engine.config import EngineConfig
from llmopt.errors import InputError
from llmopt.model.config import ModelConfig

logger = logging.getLogger(__name__)

LARGEST_DEFAULT = 1 << 30
SHARE_OF_FREE_MEMORY = 8


@dataclass(frozen=True)
class CachePlan:
    """The number of blocks, the bytes that each takes over all layers (of the draft too, where there is one), and the
    longest request (prompt and output, in tokens)."""

    blocks: int
    block_bytes: int
    max_model_len: int


def block_bytes(config: EngineConfig, model: ModelConfig, kind: str) -> int:
    """What one block takes in the caches of all layers of a model."""
    return config.block_size * model.num_layers * bytes_per_token(kind, model.num_kv_heads, model.head_dim)


def plan_cache(config: EngineConfig, model: ModelConfig, kind: str, draft: ModelConfig | None = None) -> CachePlan:
    """Settle the block pool's size and the longest request, for one of CACHE_DTYPES; a draft has as many blocks.

    Raises InputError where a length or size was asked for that does not go with the model or with each other.
    """
    if config.max_model_len is not None and config.max_model_len > model.max_position:
        raise InputError(
            f"max_model_len {config.max_model_len} is more than the {model.max_position} tokens the model was made for"
        )
    length = config.max_model_len or model.max_position
    size = sum(block_bytes(config, one, kind) for one in (model, draft) if one is not None)
    wanted = config.max_num_seqs * -(-length // config.block_size)
    if config.kv_cache_memory_bytes is None:
        budget = min(LARGEST_DEFAULT, psutil.virtual_memory().available // SHARE_OF_FREE_MEMORY)
        blocks = min(wanted, budget // size)
    else:
        blocks = config.kv_cache_memory_bytes // size
    capacity = blocks * config.block_size
    if blocks * size > psutil.virtual_memory().total:
        raise InputError(f"a KV cache of {blocks * size} bytes is more than this machine's memory")
    if capacity < 2:
        raise InputError(f"a KV cache of this size holds no token; give at least {2 * size} bytes")
    if capacity < length:
        if config.max_model_len is not None:
            raise InputError(
                f"a request of max_model_len {length} does not fit into the KV cache's {capacity} tokens; give "
                f"--kv-cache-memory-bytes of at least {-(-length // config.block_size) * size}"
            )
        logger.warning("requests are limited to the %d tokens that the KV cache holds (model: %d)", capacity, length)
    return CachePlan(blocks, size, min(length, capacity))
