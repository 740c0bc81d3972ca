"""Compiled attention of decoding against the reference, on every instruction set that this processor has."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.backend.base import PagedBatch, Scores
from llmopt.backend.kv_cache import KVCache
from llmopt.backend.reference import ReferenceBackend

_cpu = pytest.importorskip("llmopt.kernels._cpu", reason="the compiled kernels are not built")
cpu = pytest.importorskip("llmopt.backend.cpu")

BACKENDS = [cpu.CpuBackend(threads, name) for name in _cpu.instruction_sets() for threads in (1, 2)]
REFERENCE = ReferenceBackend()


def random_step(
    contexts: list[int], queries: list[int], kv_heads: int, shared: int, head_dim: int, block_size: int, seed: int
) -> tuple[torch.Tensor, KVCache, PagedBatch]:
    """Queries and a cache whose blocks lie in random order; what no sequence holds is absurd."""
    generator = torch.Generator().manual_seed(seed)
    widths = [-(-context // block_size) for context in contexts]
    order = torch.randperm(sum(widths) + 2, generator=generator).int()
    tables = torch.zeros(len(contexts), max(widths), dtype=torch.int32)
    shape = (len(order), block_size, kv_heads, head_dim)
    keys, values = torch.full(shape, 1e6), torch.full(shape, 1e6)
    taken = 0
    for row, (context, width) in enumerate(zip(contexts, widths, strict=True)):
        tables[row, :width] = order[taken : taken + width]
        taken += width
        for position in range(context):
            block = tables[row, position // block_size]
            for cache in (keys, values):
                cache[block, position % block_size] = torch.randn(kv_heads, head_dim, generator=generator)
    starts = [0, *torch.tensor(queries).cumsum(0).tolist()]
    unused = torch.zeros(0, dtype=torch.int64)
    batch = PagedBatch(starts, torch.tensor(contexts, dtype=torch.int32), tables, unused, unused)
    return torch.randn(starts[-1], kv_heads * shared, head_dim, generator=generator), KVCache(keys, values), batch


@settings(deadline=None, max_examples=60)
@given(
    contexts=st.lists(st.integers(1, 70), min_size=1, max_size=6),
    kv_heads=st.integers(1, 3),
    shared=st.integers(1, 4),
    head_dim=st.sampled_from([16, 48, 64, 128]),
    block_size=st.sampled_from([1, 4, 16]),
    window=st.sampled_from([None, 1, 7, 1000]),
    seed=st.integers(0, 10**6),
)
def test_the_same_as_the_reference(contexts, kv_heads, shared, head_dim, block_size, window, seed) -> None:
    step = random_step(contexts, [1] * len(contexts), kv_heads, shared, head_dim, block_size, seed)
    expected = REFERENCE.attend(*step, Scores(0.3, window))
    for backend in BACKENDS:
        torch.testing.assert_close(backend.attend(*step, Scores(0.3, window)), expected, atol=2e-6, rtol=1e-5)


def test_decoding_beside_a_prompt() -> None:
    """Sequences with one query are taken out of a mixed step and put back in their places."""
    step = random_step([9, 20, 5, 31], [1, 6, 1, 31], 2, 3, 32, 4, seed=1)
    expected = REFERENCE.attend(*step, Scores(0.2))
    for backend in BACKENDS:
        torch.testing.assert_close(backend.attend(*step, Scores(0.2)), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_to_the_bit_the_same_alone_and_in_a_batch(backend) -> None:
    contexts = [33, 1, 70, 16, 17]
    queries, cache, batch = random_step(contexts, [1] * 5, 3, 3, 64, 16, seed=2)
    together = backend.attend(queries, cache, batch, Scores(0.125))
    for row, context in enumerate(contexts):
        table = batch.block_tables[row : row + 1, : -(-context // 16)].contiguous()
        one = PagedBatch([0, 1], batch.context_lens[row : row + 1], table, batch.slots, batch.positions)
        assert torch.equal(backend.attend(queries[row : row + 1], cache, one, Scores(0.125))[0], together[row])


def test_extreme_scores() -> None:
    queries, cache, batch = random_step([40], [1], 1, 1, 16, 16, seed=3)
    expected = REFERENCE.attend(queries * 1e4, cache, batch, Scores(1.0))
    assert expected.isfinite().all()
    for backend in BACKENDS:
        torch.testing.assert_close(backend.attend(queries * 1e4, cache, batch, Scores(1.0)), expected)


@pytest.mark.parametrize(("head_dim", "dtype"), [(24, torch.float32), (32, torch.bfloat16)])
def test_what_the_kernel_cannot_do_goes_to_the_reference_with_one_warning(head_dim, dtype, caplog) -> None:
    queries, cache, batch = random_step([12, 30], [1, 1], 2, 2, head_dim, 4, seed=4)
    cache = KVCache(cache.keys.to(dtype), cache.values.to(dtype))
    backend = cpu.CpuBackend(1)
    with caplog.at_level(logging.WARNING, logger="llmopt.backend.cpu"):
        for _ in range(2):
            found = backend.attend(queries, cache, batch, Scores(0.2))
    torch.testing.assert_close(found, REFERENCE.attend(queries, cache, batch, Scores(0.2)), atol=1e-5, rtol=1e-5)
    assert len(caplog.records) == 1 and "attention" in caplog.records[0].getMessage()
