"""Turns scheduled chunks into the flat arrays of one step."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmopt.backend.base import PagedBatch
from llmopt.engine.request import Request
from llmopt.engine.scheduler import Chunk


@dataclass(frozen=True)
class Batch:
    """One step's input.

    Attributes:
        tokens: int64 [T], all chunks end to end.
        paged: where these tokens stand in the cache.
        sampling: the requests whose next token can be sampled, in order.
        last_rows: int64 [len(sampling)], the row among T of each such request's last token.
    """

    tokens: Tensor
    paged: PagedBatch
    sampling: list[Request]
    last_rows: Tensor


def build_batch(chunks: list[Chunk], block_size: int, device: torch.device) -> Batch:
    """The batch of a step; a request's blocks must already hold its chunk."""
    counts = np.array([chunk.count for chunk in chunks])
    starts = np.concatenate(([0], np.cumsum(counts)))
    tokens = np.concatenate([chunk.request.tokens[chunk.start : chunk.start + chunk.count] for chunk in chunks])
    positions = np.concatenate([np.arange(chunk.start, chunk.start + chunk.count) for chunk in chunks])
    tables = np.zeros((len(chunks), max(len(chunk.request.blocks) for chunk in chunks)), dtype=np.int32)
    for row, chunk in zip(tables, chunks, strict=True):
        row[: len(chunk.request.blocks)] = chunk.request.blocks
    sequence = np.repeat(np.arange(len(chunks)), counts)
    slots = tables[sequence, positions // block_size].astype(np.int64) * block_size + positions % block_size
    closing = [index for index, chunk in enumerate(chunks) if chunk.closes_gap]

    def place(array: np.ndarray, dtype: type) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype)).to(device, non_blocking=True)

    return Batch(
        tokens=place(tokens, np.int64),
        paged=PagedBatch(
            query_starts=starts.tolist(),
            context_lens=place(np.array([chunk.start + chunk.count for chunk in chunks]), np.int32),
            block_tables=place(tables, np.int32),
            slots=place(slots, np.int64),
            positions=place(positions, np.int64),
        ),
        sampling=[chunks[index].request for index in closing],
        last_rows=place(starts[1:][closing] - 1, np.int64),
    )
