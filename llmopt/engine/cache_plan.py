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
    """The number of blocks, the bytes that each takes over all layers, and the longest request (prompt and output, in
    tokens)."""

    blocks: int
    block_bytes: int
    max_model_len: int


def plan_cache(config: EngineConfig, model: ModelConfig, kind: str) -> CachePlan:
    """Settle the block pool's size and the longest request, for one of CACHE_DTYPES.

    Raises InputError where a length or size was asked for that does not go with the model or with each other.
    """
    if config.max_model_len is not None and config.max_model_len > model.max_position:
        raise InputError(
            f"max_model_len {config.max_model_len} is more than the {model.max_position} tokens the model was made for"
        )
    length = config.max_model_len or model.max_position
    block_bytes = config.block_size * model.num_layers * bytes_per_token(kind, model.num_kv_heads, model.head_dim)
    wanted = config.max_num_seqs * -(-length // config.block_size)
    if config.kv_cache_memory_bytes is None:
        budget = min(LARGEST_DEFAULT, psutil.virtual_memory().available // SHARE_OF_FREE_MEMORY)
        blocks = min(wanted, budget // block_bytes)
    else:
        blocks = config.kv_cache_memory_bytes // block_bytes
    capacity = blocks * config.block_size
    if blocks * block_bytes > psutil.virtual_memory().total:
        raise InputError(f"a KV cache of {blocks * block_bytes} bytes is more than this machine's memory")
    if capacity < 2:
        raise InputError(f"a KV cache of this size holds no token; give at least {2 * block_bytes} bytes")
    if capacity < length:
        if config.max_model_len is not None:
            raise InputError(
                f"a request of max_model_len {length} does not fit into the KV cache's {capacity} tokens; give "
                f"--kv-cache-memory-bytes of at least {-(-length // config.block_size) * block_bytes}"
            )
        logger.warning("requests are limited to the %d tokens that the KV cache holds (model: %d)", capacity, length)
    return CachePlan(blocks, block_bytes, min(length, capacity))
