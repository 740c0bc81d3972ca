"""Turns scheduled chunks into the flat arrays of one step."""

from array import array
from dataclasses import dataclass

from llmopt.backend.base import HostBatch
from llmopt.engine.request import Request
from llmopt.engine.scheduler import Chunk


@dataclass(frozen=True)
class Batch:
    """One step's input.

    Attributes:
        host: all chunks end to end, and where their tokens stand in the cache.
        sampling: the requests whose next token can be sampled, in order.
        last_rows: int64 [len(sampling)], the row among T of each such request's last token.
    """

    host: HostBatch
    sampling: list[Request]
    last_rows: "array[int]"


def build_batch(chunks: list[Chunk], block_size: int) -> Batch:
    """The batch of a step; a request's blocks must already hold its chunk."""
    tokens, slots, positions, last_rows = (array("q") for _ in range(4))
    query_starts, context_lens, block_tables = array("i", [0]), array("i"), array("i")
    sampling = []
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
            sampling.append(request)
            last_rows.append(len(tokens) - 1)
    host = HostBatch(tokens, query_starts, context_lens, block_tables, width, slots, positions)
    return Batch(host, sampling, last_rows)
