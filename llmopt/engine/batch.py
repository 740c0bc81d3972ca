"""Turns scheduled chunks into the flat arrays of one step."""

from array import array
from dataclasses import dataclass

from llmopt.backend.base import HostBatch
from llmopt.engine.row import Row
from llmopt.engine.scheduler import Chunk


@dataclass(frozen=True)
class Batch:
    """One step's input.

    Attributes:
        host: all chunks end to end, and where their tokens stand in the cache.
        rows: the choices that can be made, in the order of the chunks: one for each that closes its request's gap, and
            one more for each token that is drafted there.
        last_rows: int64 [len(rows)], the row among T of the token that each choice follows.
    """

    host: HostBatch
    rows: list[Row]
    last_rows: "array[int]"


def build_batch(chunks: list[Chunk], block_size: int) -> Batch:
    """The batch of a step; a request's blocks must already hold its chunk."""
    tokens, slots, positions, last_rows = (array("q") for _ in range(4))
    query_starts, context_lens, block_tables = array("i", [0]), array("i"), array("i")
    rows: list[Row] = []
    width = max(len(chunk.request.blocks) for chunk in chunks)
    for chunk in chunks:
        request, blocks, end = chunk.request, chunk.request.blocks, chunk.start + chunk.count
        tokens.extend(chunk.tokens)
        positions.extend(range(chunk.start, end))
        slots.extend(
            [blocks[place // block_size] * block_size + place % block_size for place in range(chunk.start, end)]
        )
        query_starts.append(len(tokens))
        context_lens.append(end)
        block_tables.extend(blocks)
        block_tables.extend([0] * (width - len(blocks)))
        if chunk.closes_gap:
            rows += [Row(request, request.drafts[:count]) for count in range(chunk.drafted + 1)]
            last_rows.extend(range(len(tokens) - 1 - chunk.drafted, len(tokens)))
    host = HostBatch(tokens, query_starts, context_lens, block_tables, width, slots, positions)
    return Batch(host, rows, last_rows)
