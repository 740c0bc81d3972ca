"""Between GGUF's names and row orders and Hugging Face's, which are the ones used everywhere else in llmopt."""

import re

import torch
from torch import Tensor

from llmopt.model.architectures import Architecture
from llmopt.model.config import ModelConfig
from llmopt.weights.quantized import QuantizedTensor, Weight

_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_PATTERN = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


def to_gguf(name: str) -> str:
    """GGUF's name for a parameter's Hugging Face name. Raises KeyError for a name that no family here has."""
    if name in _TOP:
        return _TOP[name]
    match = _PATTERN.fullmatch(name)
    if match is None:
        raise KeyError(name)
    layer, module, kind = match.groups()
    return f"blk.{layer}.{_LAYER[module]}.{kind}"


def permuted_heads(name: str, architecture: Architecture, config: ModelConfig) -> int | None:
    """How many heads the rows of this parameter are permuted in by GGUF; None where they are not."""
    if not architecture.gguf_permutes_qk:
        return None
    if ".self_attn.q_proj." in name:
        return config.num_heads
    return config.num_kv_heads if ".self_attn.k_proj." in name else None


def halves_to_pairs(weight: Weight, heads: int) -> Weight:
    """From Hugging Face's row order (each head's first half, then its second) to GGUF's (pairs of neighbours)."""
    rows = torch.arange(weight.shape[0]).reshape(heads, 2, -1).swapaxes(1, 2).flatten()
    return _select(weight, rows)


def pairs_to_halves(weight: Weight, heads: int) -> Weight:
    """The inverse of `halves_to_pairs`."""
    rows = torch.arange(weight.shape[0]).reshape(heads, -1, 2).swapaxes(1, 2).flatten()
    return _select(weight, rows)


def _select(weight: Weight, rows: Tensor) -> Weight:
    return weight.select_rows(rows) if isinstance(weight, QuantizedTensor) else weight[rows]
