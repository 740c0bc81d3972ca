"""Turns scheduled chunks into the flat arrays of one step."""

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from llmopt.backend.base import PagedBatch
from llmopt.engine.row import Row
from llmopt.engine.scheduler import Chunk


@dataclass(frozen=True)
class Batch:
    """One step's input.

    Attributes:
        tokens: int64 [T], all chunks end to end.
        paged: where these tokens stand in the cache.
        rows: the choices that can be made, in the order of the chunks: one for each that closes its request's gap, and
            one more for each token that is drafted there.
        last_rows: int64 [len(rows)], the row among T of the token that each choice follows.
    """

    tokens: Tensor
    paged: PagedBatch
    rows: list[Row]
    last_rows: Tensor


def build_batch(chunks: list[Chunk], block_size: int, device: torch.device) -> Batch:
    """The batch of a step; a request's blocks must already hold its chunk."""
    counts = np.array([chunk.count for chunk in chunks], np.int64)
    firsts = np.array([chunk.start for chunk in chunks], np.int64)
    starts = np.array([0, *accumulate(chunk.count for chunk in chunks)], np.int64)
    tables = np.zeros((len(chunks), max(len(chunk.request.blocks) for chunk in chunks)), dtype=np.int32)
    for row, chunk in zip(tables, chunks, strict=True):
        row[: len(chunk.request.blocks)] = chunk.request.blocks
    sequence = np.arange(len(chunks)).repeat(counts)
    positions = np.arange(starts[-1]) + (firsts - starts[:-1])[sequence]
    slots = tables[sequence, positions // block_size].astype(np.int64) * block_size + positions % block_size
    rows: list[Row] = []
    last_rows: list[int] = []
    for chunk, end in zip(chunks, starts[1:].tolist(), strict=True):
        if chunk.closes_gap:
            rows += [Row(chunk.request, chunk.request.drafts[:count]) for count in range(chunk.drafted + 1)]
            last_rows += range(end - 1 - chunk.drafted, end)

    def place(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    return Batch(
        tokens=place(np.array([token for chunk in chunks for token in chunk.tokens], np.int64)),
        paged=PagedBatch(
            query_starts=starts.tolist(),
            context_lens=place((firsts + counts).astype(np.int32)),
            block_tables=place(tables),
            slots=place(slots),
            positions=place(positions),
        ),
        rows=rows,
        last_rows=place(np.array(last_rows, np.int64)),
    )
