"""A whole decoder on the CPU kernels: one call from Python for all layers of a step."""

from array import array

import torch
from torch import Tensor

from llmopt.backend.base import DecoderParts, FusedDecoder, HostBatch, LayerParts, Linear
from llmopt.backend.paged_cache import DTYPES, MOST_CHANNELS, STEP, PagedCache
from llmopt.kernels._cpu import Decoder, DenseWeight, IntegerWeight, Multiplier


class CpuDecoder(FusedDecoder):
    """Owns the caches of all layers and keeps alive what the kernels know by address."""

    def __init__(
        self, multiplier: Multiplier, parts: DecoderParts, blocks: int, block_size: int, cache_dtype: str
    ) -> None:
        """`why_not` must have given no reason against it."""
        kind = "bfloat16" if cache_dtype == "auto" else cache_dtype
        self.vocabulary = parts.head.out_features
        self.hidden_size = parts.norm.shape[0]
        shape = (blocks, block_size, parts.kv_heads, parts.head_dim)
        self.caches = [PagedCache.allocate(kind, *shape) for _ in parts.layers]
        self._kept: list[Tensor] = []
        self._parts = parts
        self._decoder = Decoder(
            multiplier,
            heads=parts.heads,
            kv_heads=parts.kv_heads,
            head_dim=parts.head_dim,
            rotated=2 * len(parts.frequencies),
            block_size=block_size,
            eps=parts.eps,
            cache=kind,
            embedding=parts.embedding.data_ptr(),
            embedding_dtype=str(parts.embedding.dtype).removeprefix("torch."),
            hidden=self.hidden_size,
            norm=self._keep(parts.norm),
            head=packed(parts.head),
            frequencies=self._keep(parts.frequencies),
        )
        for layer, cache in zip(parts.layers, self.caches, strict=True):
            self._add(layer, cache)

    @staticmethod
    def why_not(parts: DecoderParts, block_size: int, cache_dtype: str) -> str | None:
        """What about this decoder the kernels cannot do as one operation, or None."""
        if parts.extras:
            return f"the compiled decoder does not know {', '.join(parts.extras)}"
        if cache_dtype not in ("auto", *DTYPES):
            return f"the compiled decoder's KV cache holds {', '.join(DTYPES)}, not {cache_dtype}"
        if parts.head_dim % STEP or parts.head_dim > MOST_CHANNELS or block_size % STEP:
            return f"the compiled decoder takes heads and blocks of a multiple of {STEP}, heads up to {MOST_CHANNELS}"
        linears = [parts.head]
        for layer in parts.layers:
            linears += [layer.qkv, layer.output, layer.gate_up, layer.down]
        if not all(packed(linear) for linear in linears):
            return "the compiled decoder takes only weights that have kernels"
        return None

    def hidden(self, batch: HostBatch) -> Tensor:
        out = torch.empty(len(batch.tokens), self.hidden_size)
        self._decoder.hidden(*_addresses(batch), out.data_ptr())
        return out

    def logits(self, batch: HostBatch, rows: "array[int]") -> Tensor:
        out = torch.empty(len(rows), self.vocabulary)
        self._decoder.logits(*_addresses(batch), *rows.buffer_info(), out.data_ptr())
        return out

    def _add(self, layer: LayerParts, cache: PagedCache) -> None:
        self._decoder.add_layer(
            qkv=packed(layer.qkv),
            output=packed(layer.output),
            gate_up=packed(layer.gate_up),
            down=packed(layer.down),
            input_norm=self._keep(layer.input_norm),
            mlp_norm=self._keep(layer.mlp_norm),
            query_norm=self._keep(layer.query_norm),
            key_norm=self._keep(layer.key_norm),
            window=layer.window or 0,
            cache=cache.layer(),
        )

    def _keep(self, tensor: Tensor | None) -> int:
        """The address of a float32 copy that lives as long as this; 0 for None."""
        if tensor is None:
            return 0
        self._kept.append(tensor.float().contiguous())
        return self._kept[-1].data_ptr()


def _addresses(batch: HostBatch) -> tuple[int, ...]:
    """What the kernels take of a batch: numbers of sequences and tokens, the tables' width, and addresses."""
    arrays = (
        batch.query_starts,
        batch.context_lens,
        batch.block_tables,
        batch.slots,
        batch.tokens,
        batch.positions,
    )
    sizes = (len(batch.context_lens), len(batch.tokens), batch.table_width)
    return (*sizes, *[values.buffer_info()[0] for values in arrays])


def packed(linear: Linear) -> list[IntegerWeight | DenseWeight]:
    """The kernels' weights of a linear operation; none where the kernels do not do all of it."""
    parts = getattr(linear, "parts", [])
    return parts if all(isinstance(part, IntegerWeight | DenseWeight) for part in parts) else []
