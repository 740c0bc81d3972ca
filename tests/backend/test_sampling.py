"""Compiled sampling against its definition in torch, on every instruction set that this processor has."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.backend import reference_sampling
from llmopt.backend.reference import ReferenceBackend
from llmopt.backend.sampling import Bias, Draws, Penalties, SamplingBatch, TokenLists

_cpu = pytest.importorskip("llmopt.kernels._cpu", reason="the compiled kernels are not built")
cpu = pytest.importorskip("llmopt.backend.cpu")

BACKENDS = [cpu.CpuBackend(threads, name) for name in _cpu.instruction_sets() for threads in (1, 2)]
REFERENCE = ReferenceBackend()
SLACK = 1e-6  # the kernels' weights are float32, those of the definition float64

TEMPERATURES = st.sampled_from([0.0, 1e-5, 0.3, 0.7, 1.0, 1.3, 100.0])
FILTERS = (
    st.sampled_from([0, 0, 1, 2, 5, 40, 2**31]),  # top-k
    st.sampled_from([1.0, 1.0, 1e-6, 0.3, 0.5, 0.9, 0.999]),  # top-p
    st.sampled_from([0.0, 0.0, 1e-30, 0.01, 0.3, 1.0]),  # min-p
)


def random_logits(generator: np.random.Generator, rows: int, vocabulary: int, kind: str) -> torch.Tensor:
    """Rows of one kind: spread as a model's, full of ties, or at the ends of what a float can be."""
    shape = (rows, vocabulary)
    if kind == "spread":
        logits = generator.normal(0, 4, shape)
    elif kind == "tied":
        logits = generator.integers(-3, 4, shape).astype(float)
    elif kind == "near":  # most differ by less than the finest bucket
        logits = 5 + generator.normal(0, 1e-4, shape)
    elif kind == "equal":
        logits = np.full(shape, generator.normal())
    else:
        logits = generator.choice([np.inf, -np.inf, np.nan, 3e38, -3e38, 1e-40, 0.0, 1.0, 2.0], shape)
    return torch.from_numpy(logits.astype(np.float32))


def make_draws(generator: np.random.Generator, *columns: list[float]) -> Draws:
    uniform = generator.choice([0.0, 0.5, 1 - 2.0**-53, *generator.random(3)], len(columns[0]))
    types = (np.float32, np.int64, np.float32, np.float32)
    return Draws(*(np.array(column, t) for column, t in zip(columns, types, strict=True)), uniform)


def ragged_tokens(generator: np.random.Generator, rows: int, vocabulary: int) -> TokenLists:
    lists = [generator.choice(vocabulary, generator.integers(0, vocabulary), replace=False) for _ in range(rows)]
    starts = np.cumsum([0, *(len(tokens) for tokens in lists)], dtype=np.int64)
    return TokenLists(starts, np.concatenate(lists).astype(np.int32))


def make_penalties(generator: np.random.Generator, rows: int, vocabulary: int) -> Penalties:
    starts, tokens = ragged_tokens(generator, rows, vocabulary)
    repetition = generator.choice([1.0, 1.1, 0.5, 7.0], rows).astype(np.float32)
    frequency, presence = generator.choice([0.0, 0.1, -2.0, 1.7], (2, rows)).astype(np.float32)
    return Penalties(repetition, frequency, presence, starts, tokens, generator.integers(0, 4, len(tokens), np.int32))


def make_bias(generator: np.random.Generator, rows: int, vocabulary: int) -> Bias:
    starts, tokens = ragged_tokens(generator, rows, vocabulary)
    return Bias(starts, tokens, generator.choice([-100.0, -0.3, 0.0, 1e-7, 5.0, 100.0], len(tokens)).astype(np.float32))


def order_of_tokens(logits: torch.Tensor, draws: Draws) -> torch.Tensor:
    """The place of each token [R, vocabulary] in the order in which its row's draw adds up masses."""
    scaled = logits / torch.from_numpy(draws.temperature)[:, None]
    by_likelihood = scaled.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return torch.where(torch.from_numpy(draws.filtered())[:, None], by_likelihood, torch.arange(logits.shape[1]))


def permitted(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """bool [R, vocabulary]: what may be chosen: what the definition chooses, and, where it draws, all that lies between
    its choices for numbers that differ by SLACK."""
    logits = logits.clone()
    expected = REFERENCE.sample(logits, batch)  # logits hold their penalties afterwards
    if batch.draws is None:
        return torch.arange(logits.shape[1]) == expected[:, None]
    places = order_of_tokens(logits, batch.draws)
    bounds = []
    for change in (-SLACK, SLACK):
        for limits in (-SLACK, SLACK):
            draws = batch.draws._replace(
                uniform=np.clip(batch.draws.uniform + change, 0, 1 - 2.0**-53),
                top_p=np.where(batch.draws.top_p < 1, batch.draws.top_p * np.float32(1 + limits), np.float32(1)),
                min_p=np.minimum(batch.draws.min_p * np.float32(1 - limits), np.float32(1)),
            )
            bounds.append(places.gather(1, REFERENCE.sample(logits, SamplingBatch(draws))[:, None]))
    return (torch.stack(bounds).amin(0) <= places) & (places <= torch.stack(bounds).amax(0))


def any_changes(generator: np.random.Generator, rows: int, vocabulary: int, data) -> list:
    """The parts of a SamplingBatch that change logits, each of them or None."""
    makers = (make_bias, make_penalties, ragged_tokens, ragged_tokens)
    return [make(generator, rows, vocabulary) if data.draw(st.booleans()) else None for make in makers]


def check_all(logits: torch.Tensor, batch: SamplingBatch) -> None:
    allowed = permitted(logits, batch)
    for backend in BACKENDS:
        tokens = backend.sample(logits.clone(), batch)
        assert allowed.gather(1, tokens[:, None]).all(), (tokens, allowed.nonzero())


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_the_same_as_the_definition(data) -> None:
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    rows, vocabulary = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([1, 2, 15, 16, 64, 65, 300, 1000]))
    kind = data.draw(st.sampled_from(["spread", "tied", "near", "equal", "extreme"]))
    logits = random_logits(generator, rows, vocabulary, kind)
    columns = [data.draw(st.lists(each, min_size=rows, max_size=rows)) for each in (TEMPERATURES, *FILTERS)]
    draws = make_draws(generator, *columns) if data.draw(st.booleans()) else None
    check_all(logits, SamplingBatch(draws, *any_changes(generator, rows, vocabulary, data)))


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_logits_are_changed_to_the_same_floats(data) -> None:
    """A backend leaves the logits as they were when it chose."""
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    rows, vocabulary = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([1, 2, 15, 64, 300]))
    logits = random_logits(generator, rows, vocabulary, data.draw(st.sampled_from(["spread", "tied", "extreme"])))
    batch = SamplingBatch(None, *any_changes(generator, rows, vocabulary, data))
    expected = logits.clone()
    reference_sampling.adjust(expected, batch)
    for backend in BACKENDS:
        changed = logits.clone()
        backend.sample(changed, batch)
        torch.testing.assert_close(changed, expected, rtol=0, atol=0, equal_nan=True)


def token_by_token(logits: np.ndarray, batch: SamplingBatch) -> np.ndarray:
    """What `adjust` is to do, one float at a time."""
    changed = logits.copy()

    def tokens_of(lists, row: int) -> dict[int, int]:
        places = range(lists.starts[row], lists.starts[row + 1])
        return {int(lists.tokens[place]): place for place in places}

    for row, token in np.ndindex(*logits.shape):
        value = logits[row, token]
        if batch.bias and token in tokens_of(batch.bias, row):
            value += batch.bias.values[tokens_of(batch.bias, row)[token]]
        if batch.penalties and token in tokens_of(batch.penalties, row):
            repetition, frequency, presence, _, _, counts = batch.penalties
            count = np.float32(counts[tokens_of(batch.penalties, row)[token]])
            value = value / repetition[row] if value > 0 else value * repetition[row]
            value -= (frequency[row] * count + presence[row]) if count else np.float32(0)
        only = tokens_of(batch.allowed, row) if batch.allowed else {}
        banned = batch.forbidden is not None and token in tokens_of(batch.forbidden, row)
        changed[row, token] = -np.inf if banned or (only and token not in only) else value
    return changed


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_the_definition_does_what_it_says(data) -> None:
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    rows, vocabulary = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    logits = random_logits(generator, rows, vocabulary, "spread")
    batch = SamplingBatch(None, *any_changes(generator, rows, vocabulary, data))
    expected = torch.from_numpy(token_by_token(logits.numpy(), batch))
    reference_sampling.adjust(logits, batch)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)


def same_draws(
    rows: int, temperature: float, top_k: int = 0, top_p: float = 1, min_p: float = 0, seed: int = 0
) -> Draws:
    """All rows with the same settings and a random number of their own."""
    uniform = np.random.default_rng(seed).random(rows)
    return Draws(
        np.full(rows, temperature, np.float32),
        np.full(rows, top_k, np.int64),
        np.full(rows, top_p, np.float32),
        np.full(rows, min_p, np.float32),
        uniform,
    )


SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 0.8, "top_k": 50},
    {"temperature": 1.0, "top_p": 0.95},
    {"temperature": 1.5, "min_p": 0.01},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.05},
    {"temperature": 100.0, "top_k": 30_000, "top_p": 0.9},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_whole_vocabularies(setting: dict, spread: float) -> None:
    generator = np.random.default_rng(1)
    rows, vocabulary = 3, 50_000
    logits = torch.from_numpy(generator.normal(0, spread, (rows, vocabulary)).astype(np.float32))
    bias, penalties = make_bias(generator, rows, vocabulary), make_penalties(generator, rows, vocabulary)
    allowed = ragged_tokens(generator, rows, vocabulary)
    check_all(logits, SamplingBatch(same_draws(rows, **setting), bias, penalties, None, allowed))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("instruction_set", _cpu.instruction_sets())
def test_a_row_does_not_depend_on_its_neighbours_or_on_threads(setting: dict, instruction_set: str) -> None:
    logits = torch.from_numpy(np.random.default_rng(2).normal(0, 3, (9, 40_000)).astype(np.float32))
    draws = same_draws(9, **setting)
    together = cpu.CpuBackend(4, instruction_set).sample(logits.clone(), SamplingBatch(draws))
    backend = cpu.CpuBackend(1, instruction_set)
    for row in range(9):
        own = SamplingBatch(draws.of_rows(np.arange(9) == row))
        assert backend.sample(logits[row : row + 1].clone(), own).item() == together[row]


def test_one_greedy_row_is_shared_among_threads() -> None:
    logits = torch.from_numpy(np.random.default_rng(3).normal(0, 3, (1, 100_003)).astype(np.float32))
    for place in (0, 16_383, 16_384, 70_000, 100_002):
        for value in (1e3, math.inf, math.nan):
            broken = logits.clone()
            broken[0, place] = value
            broken[0, place + 1 :: 1000] = value  # what follows is no larger
            for backend in BACKENDS:
                assert backend.sample(broken.clone(), SamplingBatch()).tolist() == [place]


@pytest.mark.parametrize(
    ("setting", "kept"),
    [
        ({"temperature": 1.0}, 10),
        ({"temperature": 2.0, "top_k": 4}, 4),
        ({"temperature": 1.0, "top_p": 0.8}, 5),
        ({"temperature": 1.0, "min_p": 0.2}, 6),
        ({"temperature": 0.5, "top_k": 6, "top_p": 0.99, "min_p": 0.05}, 6),
        ({"temperature": 1.0, "top_p": 0.7, "min_p": 0.5}, 2),  # min-p leaves 0.6 in all, of which two have 0.45
    ],
)
def test_tokens_come_as_often_as_they_should(setting: dict, kept: int) -> None:
    """Pearson's chi-square at 0.1%; random numbers are seeded, so this never flickers."""
    rows = 20_000
    probabilities = np.array([0.02, 0.25, 0.03, 0.2, 0.05, 0.15, 0.1, 0.12, 0.01, 0.07])
    wanted = probabilities ** (1 / setting["temperature"])
    wanted[np.argsort(-wanted)[kept:]] = 0
    wanted = wanted / wanted.sum()
    logits = torch.from_numpy(np.log(probabilities).astype(np.float32)).expand(rows, -1)
    critical = {2: 10.83, 4: 16.27, 5: 18.47, 6: 20.52, 10: 27.88}[kept]
    for backend in (REFERENCE, *BACKENDS):
        tokens = backend.sample(logits.clone(), SamplingBatch(same_draws(rows, **setting, seed=4)))
        counts = np.bincount(tokens.numpy(), minlength=len(wanted))
        assert not counts[wanted == 0].any()
        expected = rows * wanted[wanted > 0]
        assert ((counts[wanted > 0] - expected) ** 2 / expected).sum() < critical


@pytest.mark.parametrize(
    ("setting", "kept"),
    [({}, [1, 2, 4, 5]), ({"top_k": 3}, [1, 2, 4]), ({"top_p": 0.5}, [1, 2]), ({"min_p": 0.2}, [1, 2, 4])],
)
def test_bias_and_allowed_tokens_change_what_is_drawn_from(setting: dict, kept: list[int]) -> None:
    """Pearson's chi-square at 0.1%, of four tokens left of six, two of them made likelier."""
    rows = 20_000
    probabilities = np.array([0.4, 0.05, 0.05, 0.3, 0.1, 0.02])
    factors = np.array([1, 8, 6, 1, 1, 1])
    allowed = np.tile(np.array([1, 2, 4, 5], np.int32), rows)
    bias = np.tile(np.array([1, 2], np.int32), rows)
    batch = SamplingBatch(
        same_draws(rows, 1.0, **setting, seed=5),
        Bias(2 * np.arange(rows + 1), bias, np.log(factors[bias]).astype(np.float32)),
        allowed=TokenLists(4 * np.arange(rows + 1), allowed),
    )
    logits = torch.from_numpy(np.log(probabilities).astype(np.float32)).expand(rows, -1)
    expected = rows * (probabilities * factors)[kept] / (probabilities * factors)[kept].sum()
    critical = {2: 10.83, 3: 13.82, 4: 16.27}[len(kept)]
    for backend in (REFERENCE, *BACKENDS):
        counts = np.bincount(backend.sample(logits.clone(), batch).numpy(), minlength=6)
        assert counts[kept].sum() == rows
        assert ((counts[kept] - expected) ** 2 / expected).sum() < critical


def test_what_is_no_number_has_a_meaning() -> None:
    rows = torch.tensor(
        [[1, math.nan, 2, math.nan], [1, math.inf, 2, math.inf], [-math.inf] * 4, [-math.inf, 0, -math.inf, -math.inf]]
    )
    for backend in (REFERENCE, *BACKENDS):
        for setting in SETTINGS:
            batch = SamplingBatch(same_draws(4, **setting))
            assert backend.sample(rows.clone(), batch).tolist() == [1, 1, 0, 1]


def test_arrays_that_do_not_fit_are_refused() -> None:
    logits, backend = torch.zeros(2, 8), BACKENDS[0]
    starts, tokens = np.array([0, 1, 2], np.int64), np.array([0, 7], np.int32)
    ones = np.ones(2, np.float32)
    assert backend.sample(logits, SamplingBatch(forbidden=TokenLists(starts, tokens))).tolist() == [1, 0]
    wrong = {
        "row": SamplingBatch(draws=same_draws(3, 1.0)),
        "vocabulary": SamplingBatch(forbidden=TokenLists(starts, tokens + 1)),
        "outside": SamplingBatch(allowed=TokenLists(starts, tokens - 1)),
        "starts": SamplingBatch(forbidden=TokenLists(starts[:2], tokens)),
        "bias": SamplingBatch(bias=Bias(starts, tokens, ones[:1])),
        "count": SamplingBatch(penalties=Penalties(ones, ones, ones, starts, tokens, tokens[:1])),
        "a row": SamplingBatch(penalties=Penalties(ones, ones[:1], ones, starts, tokens, tokens)),
    }
    for says, batch in wrong.items():
        with pytest.raises(ValueError, match=says):
            backend.sample(logits, batch)
