"""Compiled attention over caches of 16 and 8 bits, on every instruction set that this processor has.

A run feeds whole sequences through steps of chosen chunks. Its cache begins full of what is no number, and the blocks
of the sequences lie in random order.
"""

import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmopt.backend.kv_cache import bytes_per_token
from llmopt.backend.reference import ReferenceBackend, causal_mask
from llmopt.errors import InputError

_cpu = pytest.importorskip("llmopt.kernels._cpu", reason="the compiled kernels are not built")
paged = pytest.importorskip("llmopt.backend.paged_cache")

KINDS = tuple(paged.DTYPES)
MULTIPLIERS = {name: _cpu.Multiplier(2, name) for name in _cpu.instruction_sets()}
ONE_THREAD = _cpu.Multiplier(1)
REFERENCE = ReferenceBackend()
EPS = 1e-5

Chunk = tuple[int, int, int]
"""(sequence, first position, tokens)"""


@dataclass
class Model:
    """The shape of an attention layer, with random norms where it has them."""

    kind: str = "bfloat16"
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    rotated: int = 64
    block_size: int = 16
    window: int = 0
    norms: tuple[Tensor, Tensor] | None = None
    scale: float = field(init=False)

    def __post_init__(self) -> None:
        self.scale = self.head_dim**-0.5

    @property
    def width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def shape(self):
        query_norm, key_norm = (norm.data_ptr() for norm in self.norms) if self.norms else (0, 0)
        return _cpu.AttentionShape(
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            rotated=self.rotated,
            block_size=self.block_size,
            window=self.window,
            scale=self.scale,
            eps=EPS,
            query_norm=query_norm,
            key_norm=key_norm,
            kind=self.kind,
        )

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        frequencies = 10_000.0 ** -(torch.arange(self.rotated // 2) / max(1, self.rotated // 2))
        angles = positions[:, None] * frequencies
        return angles.cos(), angles.sin()

    def split(self, qkv: Tensor) -> list[Tensor]:
        """Queries, keys and values, each [tokens, heads, head_dim]."""
        return list(qkv.unflatten(1, (-1, self.head_dim)).split([self.heads, self.kv_heads, self.kv_heads], dim=1))


@dataclass
class Run:
    """What became of some sequences: each one's rotated queries, attention, and cached keys and values."""

    queries: list[Tensor]
    attended: list[Tensor]
    cached: list[tuple[Tensor, Tensor]]


def sequences_of(model: Model, lengths: list[int], seed: int) -> list[Tensor]:
    """Random [q | k | v] of sequences."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, model.width, generator=generator) for length in lengths]


def run(multiplier, model: Model, sequences: list[Tensor], steps: list[list[Chunk]], garbage: bool = True) -> Run:
    widths = [-(-len(sequence) // model.block_size) for sequence in sequences]
    order = torch.randperm(sum(widths) + 2, generator=torch.Generator().manual_seed(len(sequences))).int()
    tables = list(order[: sum(widths)].split(widths))
    cache = paged.PagedCache.allocate(model.kind, len(order), model.block_size, model.kv_heads, model.head_dim)
    if garbage:
        fill_with_garbage(cache)
    queries = [torch.zeros(len(sequence), model.heads * model.head_dim) for sequence in sequences]
    attended = [torch.zeros_like(rotated) for rotated in queries]
    for chunks in steps:
        qkv = torch.cat([sequences[s][first : first + count] for s, first, count in chunks])
        out = one_step(multiplier, model, cache, tables, chunks, qkv)
        row = 0
        for s, first, count in chunks:
            queries[s][first : first + count] = qkv[row : row + count, : out.shape[1]]
            attended[s][first : first + count] = out[row : row + count]
            row += count
    cached = [cache.dequantized(table) for table in tables]
    lengths = [len(sequence) for sequence in sequences]
    return Run(queries, attended, [(keys[:n], values[:n]) for (keys, values), n in zip(cached, lengths, strict=True)])


def one_step(multiplier, model: Model, cache, tables: list[Tensor], chunks: list[Chunk], qkv: Tensor) -> Tensor:
    """Stores and attends; qkv's queries and keys are rotated in place. Returns [tokens, heads * head_dim]."""
    padded = torch.nn.utils.rnn.pad_sequence([tables[s] for s, _, _ in chunks], batch_first=True)
    contexts = torch.tensor([first + count for _, first, count in chunks], dtype=torch.int32)
    starts = torch.tensor([0, *(count for _, _, count in chunks)]).cumsum(0).int()
    positions = torch.cat([torch.arange(first, first + count) for _, first, count in chunks])
    row = torch.repeat_interleave(torch.arange(len(chunks)), torch.tensor([count for _, _, count in chunks]))
    slots = padded[row, positions // model.block_size].long() * model.block_size + positions % model.block_size
    cos, sin = model.angles(positions)
    addresses = [array.data_ptr() for array in (starts, contexts, padded, slots, cos, sin)]
    step = _cpu.PagedStep(len(chunks), len(qkv), padded.shape[1], *addresses)
    out = torch.full((len(qkv), model.heads * model.head_dim), math.nan)
    multiplier.rotate_and_store(model.shape(), step, qkv.data_ptr(), cache.layer())
    multiplier.attend_paged(model.shape(), step, qkv.data_ptr(), out.data_ptr(), cache.layer())
    return out


def fill_with_garbage(cache) -> None:
    for tensor in (cache.keys, cache.values, cache.key_scales, cache.value_scales):
        if tensor is not None:
            tensor.fill_(-128 if tensor.dtype == torch.int8 else math.nan)


def whole(sequences: list[Tensor]) -> list[list[Chunk]]:
    return [[(s, 0, len(sequence)) for s, sequence in enumerate(sequences)]]


def assert_as_plain_attention(model: Model, found: Run, last: int = 1000) -> None:
    """Against float32 attention over the same cache, for the last queries of each sequence.

    Queries are rounded to bfloat16 here too (int8 rounds them to 16-bit integers, which is finer). What remains is the
    rounding of softmax's weights to bfloat16: each is off by 2^-8 of itself at most, so that a result is off by 2^-8 of
    the same sum over the magnitudes of the values. A tenth of that, and 2e-6, are left for float32's own order of
    additions and int8's 16-bit weights.
    """
    for queries, attended, (keys, values) in zip(found.queries, found.attended, found.cached, strict=True):
        queries, attended = queries[-last:], attended[-last:]
        wide = queries if model.kind == "int8" else queries.bfloat16().float()
        mask = causal_mask(len(queries), len(keys), model.window or None, queries.device)
        sums = [
            torch.nn.functional.scaled_dot_product_attention(
                wide.unflatten(1, (model.heads, -1)).transpose(0, 1),
                keys.repeat_interleave(model.heads // model.kv_heads, 1).transpose(0, 1),
                numbers.repeat_interleave(model.heads // model.kv_heads, 1).transpose(0, 1),
                mask,
                scale=model.scale,
            )
            for numbers in (values, values.abs())
        ]
        expected, magnitude = (one.transpose(0, 1).flatten(1) for one in sums)
        excess = (attended - expected).abs() - 1.1 * 2**-8 * magnitude
        assert excess.max() < 2e-6


@pytest.mark.parametrize("name", MULTIPLIERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "model",
    [
        Model(),
        Model(heads=9, kv_heads=3),
        Model(heads=4, kv_heads=4, head_dim=80, rotated=32, block_size=32),
        Model(heads=7, kv_heads=1, head_dim=128, rotated=128, window=50),
        Model(heads=2, kv_heads=1, head_dim=256, rotated=64, block_size=48, window=1),
        Model(heads=50, kv_heads=1, head_dim=16, rotated=12, window=200),
        Model(norms=(torch.linspace(0.5, 1.5, 64), torch.linspace(1.5, 0.5, 64))),
        Model(rotated=0),
    ],
    ids=lambda model: f"{model.heads}x{model.kv_heads}x{model.head_dim}",
)
def test_the_same_as_plain_attention(name, kind, model) -> None:
    model = replace(model, kind=kind)
    sequences = sequences_of(model, [1, 17, 150, 290], seed=1)
    found = run(MULTIPLIERS[name], model, sequences, whole(sequences))
    assert_as_plain_attention(model, found)


@pytest.mark.parametrize("name", MULTIPLIERS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored(name, kind) -> None:
    """Keys normed and rotated, values as they are, both rounded as torch rounds."""
    model = Model(kind=kind, rotated=24, norms=(torch.linspace(0.5, 1.5, 64), torch.linspace(1.5, 0.5, 64)))
    (qkv,) = sequences_of(model, [40], seed=2)
    qkv[:, -model.head_dim :] *= torch.logspace(-9, 3, 40)[:, None]  # beyond fp8's range on both sides
    qkv[7, -model.head_dim :] = 0
    queries, keys, values = model.split(qkv)
    rotation = model.angles(torch.arange(40))
    queries = REFERENCE.rope(REFERENCE.rms_norm(queries, model.norms[0], EPS), *rotation)
    keys = REFERENCE.rope(REFERENCE.rms_norm(keys, model.norms[1], EPS), *rotation)
    found = run(MULTIPLIERS[name], model, [qkv], whole([qkv]))
    torch.testing.assert_close(found.queries[0], queries.flatten(1), atol=1e-6, rtol=1e-5)
    assert torch.equal(found.cached[0][1], rounded(values, kind))
    # A key may be a step off here and there, because float32's last bits depend on the order of operations.
    expected = rounded(keys, kind)
    step = (
        keys.abs().amax(-1, keepdim=True) / 127 if kind == "int8" else keys.abs() * torch.finfo(paged.DTYPES[kind]).eps
    )
    assert ((found.cached[0][0] - expected).abs() <= 1.01 * step).all()
    assert found.cached[0][0].isclose(expected, rtol=1e-5, atol=0).float().mean() > 0.99


def rounded(x: Tensor, kind: str) -> Tensor:
    if kind == "bfloat16":
        return x.bfloat16().float()
    if kind == "fp8":
        return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    scale = x.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale == 0, 1.0, scale)
    return (x / scale).round() * scale


@settings(deadline=None, max_examples=25)
@given(
    kind=st.sampled_from(KINDS),
    heads=st.sampled_from([(3, 3), (6, 2), (7, 1)]),
    head_dim=st.sampled_from([16, 64, 80]),
    block_size=st.sampled_from([16, 64]),
    window=st.sampled_from([0, 1, 30, 140]),
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_to_the_bit_the_same_in_any_chunks_and_company(
    kind, heads, head_dim, block_size, window, lengths, seed, data
) -> None:
    model = Model(kind, *heads, head_dim, head_dim, block_size, window)
    sequences = sequences_of(model, lengths, seed)
    steps: list[list[Chunk]] = []
    done = [0] * len(lengths)
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        step = []
        for s in data.draw(st.permutations([s for s, n in enumerate(lengths) if done[s] < n])):
            count = data.draw(st.sampled_from([1, 1, 2, 5, 16, 33, 200])) if step else 20
            step.append((s, done[s], min(count, lengths[s] - done[s])))
            done[s] += step[-1][2]
        steps.append(step)
    for multiplier in MULTIPLIERS.values():
        together = run(multiplier, model, sequences, steps)
        for s, sequence in enumerate(sequences):
            alone = run(multiplier, model, [sequence], whole([sequence]), garbage=False)
            assert torch.equal(together.attended[s], alone.attended[0])
            assert torch.equal(together.cached[s][0], alone.cached[0][0])


@pytest.mark.parametrize("kind", KINDS)
def test_token_by_token(kind) -> None:
    model = Model(kind=kind)
    sequences = sequences_of(model, [140, 9], seed=3)
    one_by_one = [[(s, i, 1) for s in range(2) if i < len(sequences[s])] for i in range(140)]
    for multiplier in MULTIPLIERS.values():
        found = run(multiplier, model, sequences, one_by_one)
        expected = run(multiplier, model, sequences, whole(sequences))
        for s in range(2):
            assert torch.equal(found.attended[s], expected.attended[s])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [0, 700])
def test_to_the_bit_the_same_when_a_long_context_is_split(kind, window) -> None:
    """Two threads share one sequence's spans; one thread takes them in order."""
    model = Model(kind, heads=2, kv_heads=1, head_dim=16, rotated=16, window=window)
    sequences = sequences_of(model, [4500, 300], seed=4)
    steps = [[(0, 0, 4480)], [(0, 4480, 17), (1, 0, 299)], [(0, 4497, 1), (1, 299, 1)], [(0, 4498, 2)]]
    found = run(MULTIPLIERS[_cpu.instruction_sets()[0]], model, sequences, steps)
    expected = run(ONE_THREAD, model, sequences, whole(sequences))
    for s in range(2):
        assert torch.equal(found.attended[s], expected.attended[s])
    assert_as_plain_attention(model, found, last=20)


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_token_stays_by_itself(kind) -> None:
    """What is no number in one query shows in its own result and in no other."""
    model = Model(kind=kind)
    (sound,) = sequences_of(model, [100], seed=5)
    broken = sound.clone()
    broken[50, : model.heads * model.head_dim] = math.nan
    for multiplier in MULTIPLIERS.values():
        expected = run(multiplier, model, [sound], whole([sound])).attended[0]
        found = run(multiplier, model, [broken], whole([broken])).attended[0]
        assert found[50].isnan().all()
        found[50] = expected[50]
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_key_is_seen(kind) -> None:
    model = Model(kind=kind)
    (qkv,) = sequences_of(model, [60], seed=6)
    model.split(qkv)[1][30] = math.nan
    for multiplier in MULTIPLIERS.values():
        found = run(multiplier, model, [qkv], whole([qkv])).attended[0]
        assert found[:30].isfinite().all() and found[30:].isnan().all()


def test_every_number_of_fp8() -> None:
    """Alone, a token gets its own value: all of e4m3's numbers come back as they went in."""
    model = Model("fp8", heads=1, kv_heads=1, head_dim=256, rotated=0)
    numbers = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(0)
    qkv = torch.cat([torch.ones(512), numbers])[None]
    for multiplier in MULTIPLIERS.values():
        found = run(multiplier, model, [qkv], whole([qkv]))
        assert torch.equal(found.cached[0][1].flatten(), numbers)
        assert torch.equal(found.attended[0][0], numbers)


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_scores(kind) -> None:
    model = Model(kind=kind)
    (qkv,) = sequences_of(model, [200], seed=7)
    model.split(qkv)[0].mul_(1e4)
    for multiplier in MULTIPLIERS.values():
        found = run(multiplier, model, [qkv], whole([qkv]))
        assert found.attended[0].isfinite().all()
        # Scores of thousands differ by more than their rounding, except for a near tie here and there.
        nearest = (found.attended[0].unflatten(1, (6, 64))[:, 0, None] - found.cached[0][1][None, :, 0]).abs().amax(-1)
        assert (nearest.amin(1) < 1e-2).float().mean() > 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_per_token(kind) -> None:
    cache = paged.PagedCache.allocate(kind, blocks=5, block_size=32, kv_heads=3, head_dim=48)
    tensors = (cache.keys, cache.values, cache.key_scales, cache.value_scales)
    held = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    assert held == 5 * 32 * bytes_per_token(kind, kv_heads=3, head_dim=48)
    assert cache.kind == kind


@pytest.mark.parametrize(
    ("kind", "block_size", "head_dim", "named"),
    [
        ("int4", 16, 64, "bfloat16, int8, fp8"),
        ("fp8", 8, 64, "16"),
        ("int8", 16, 72, "72"),
        ("bfloat16", 16, 272, "272"),
    ],
)
def test_what_the_kernels_do_not_have_is_refused(kind, block_size, head_dim, named) -> None:
    with pytest.raises(InputError, match=named):
        paged.PagedCache.allocate(kind, 1, block_size, 1, head_dim)
    with pytest.raises(ValueError, match=r"16|fp8"):
        _cpu.AttentionShape(1, 1, head_dim, 0, block_size, 0, 1.0, kind=kind)
