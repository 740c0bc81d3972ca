"""Measures a model's quality on a text, against its unquantized reference where one is given."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmopt.engine.config import BackendName, DeviceName, DTypeName, EngineConfig, KVCacheDTypeName
from llmopt.engine.scoring import Scorer
from llmopt.errors import InputError
from llmopt.evaluate.divergence import Comparison, compare, log_likelihoods
from llmopt.evaluate.gates import Gates, read_gates
from llmopt.evaluate.statistics import bootstrap, perplexity, perplexity_ratio
from llmopt.evaluate.text import Text, Windows, cut_windows, read_text
from llmopt.model.tokenizer import Tokenizer, load_tokenizer
from llmopt.progress import Progress, silent

CONFIDENCE = 0.95  # where no gate file says another


def evaluate(
    model: str,
    *,
    reference: str | None = None,
    text: str | Path | None = None,
    ctx: int = 1024,
    windows: int = 16,
    gates: str | Path | Gates | None = None,
    backend: BackendName = "auto",
    device: DeviceName = "auto",
    dtype: DTypeName = "float32",
    kv_cache_dtype: KVCacheDTypeName = "auto",
    threads: int | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Perplexity of a model on a text; with a reference, also how far its predictions are from the reference's.

    Args:
        model, reference: named as on the command line. The reference always runs in float32 on the backend
            `reference`, which is the truth; the other settings are the model's.
        dtype: of the model's activations; float32 measures what the artifact holds, auto what an engine makes of it.
        kv_cache_dtype: of the model's keys and values; auto is as the activations, int8 or fp8 measures what it costs.
        text: a UTF-8 file; None for the built-in text.
        ctx: tokens in a window.
        windows: how many windows.
        gates: a gate file, or what was read of one; the verdicts are in the result.

    Returns:
        The object that `llmopt eval --json` writes. Intervals are bootstrap intervals over windows, None where there
        are fewer than two. Memory holds both models and one block of logits of each.

    Raises InputError for what does not fit together, LlmoptError where it cannot be measured.
    """
    judge = gates if gates is None or isinstance(gates, Gates) else read_gates(gates)
    if judge is not None and judge.need_reference and reference is None:
        raise InputError("the gates compare with a reference; give --reference MODEL")
    content = read_text(text)
    cut = cut_windows(load_tokenizer(model), content, ctx, windows)
    if reference is not None:
        _require_same_tokens(load_tokenizer(reference), content, cut)
    shared: dict[str, Any] = {"device": device, "threads": threads, "max_model_len": ctx}
    scorer = Scorer(EngineConfig(model=model, backend=backend, dtype=dtype, kv_cache_dtype=kv_cache_dtype, **shared))
    if reference is None:
        measured = _Measured(nll=_score(scorer, cut, progress))
    else:
        truth = Scorer(EngineConfig(model=reference, backend="reference", dtype="float32", **shared))
        measured = _compare(truth, scorer, cut, progress)
    return _report(model, reference, cut, measured, judge)


@dataclass(frozen=True)
class _Measured:
    """Numbers for each predicted token, [windows, ctx - 1] each; None for those that need a reference."""

    nll: np.ndarray
    reference_nll: np.ndarray | None = None
    kl: np.ndarray | None = None
    same_top: np.ndarray | None = None


def _require_same_tokens(tokenizer: Tokenizer, text: Text, cut: Windows) -> None:
    """Raise InputError where the reference's tokenizer cuts the text otherwise."""
    if cut_windows(tokenizer, text, cut.ctx, len(cut.tokens)).tokens != cut.tokens:
        raise InputError("the model and the reference tokenize the text differently; both need the same tokenizer")


def _score(scorer: Scorer, cut: Windows, progress: Progress) -> np.ndarray:
    """Negative log-likelihoods, float64 [windows, ctx - 1]."""
    rows = []
    for done, tokens in enumerate(cut.tokens):
        progress("windows", done, len(cut.tokens))
        parts, position = [], 0
        for block in scorer.logits(tokens):
            targets = _targets(tokens, position, len(block))
            parts.append(log_likelihoods(block[: len(targets)], targets.to(block.device)))
            position += len(block)
        rows.append(np.concatenate(parts))
    return np.stack(rows)


def _compare(truth: Scorer, scorer: Scorer, cut: Windows, progress: Progress) -> _Measured:
    """Both models in step, block by block, so that memory holds one block of logits of each."""
    rows: list[list[Comparison]] = []
    for done, tokens in enumerate(cut.tokens):
        progress("windows", done, len(cut.tokens))
        parts, position = [], 0
        for expected, block in zip(truth.logits(tokens), scorer.logits(tokens), strict=True):
            targets = _targets(tokens, position, len(block))
            parts.append(compare(expected[: len(targets)], block[: len(targets)], targets))
            position += len(block)
        rows.append(parts)

    def table(column: Callable[[Comparison], np.ndarray]) -> np.ndarray:
        return np.stack([np.concatenate([column(part) for part in parts]) for parts in rows])

    return _Measured(
        nll=table(lambda part: part.nll),
        reference_nll=table(lambda part: part.reference_nll),
        kl=table(lambda part: part.kl),
        same_top=table(lambda part: part.same_top),
    )


def _targets(tokens: list[int], position: int, count: int) -> torch.Tensor:
    """The tokens that the logits of positions `position` to `position + count` predict; the last predicts none."""
    return torch.tensor(tokens[position + 1 : position + count + 1], dtype=torch.int64)


def _report(
    model: str, reference: str | None, cut: Windows, measured: _Measured, judge: Gates | None
) -> dict[str, Any]:
    confidence = CONFIDENCE if judge is None else judge.confidence
    statistics = _statistics(measured)
    everything = np.arange(len(cut.tokens))
    values = {name: statistic(everything) for name, statistic in statistics.items()}
    intervals = {name: bootstrap(len(everything), s, confidence) for name, s in statistics.items()}
    compared = measured.reference_nll is not None
    return {
        "version": 1,
        "model": model,
        "reference": reference,
        "text": cut.describe(),
        "perplexity": {
            "value": values["perplexity.value"],
            "reference": perplexity(measured.reference_nll) if measured.reference_nll is not None else None,
            "ratio": values.get("perplexity.ratio"),
        },
        "divergence": {name: values[f"divergence.{name}"] for name in ("mean_kl", "p99_kl", "top1")}
        if compared
        else None,
        "confidence": confidence,
        "intervals": intervals,
        "tasks": {},
        "gates": [] if judge is None else judge.judge(values, intervals),
    }


def _statistics(measured: _Measured) -> dict[str, Callable[[np.ndarray], float]]:
    """Each metric as a function of the windows drawn, by the name that gates use."""
    nll, reference_nll, kl, same_top = measured.nll, measured.reference_nll, measured.kl, measured.same_top
    metrics: dict[str, Callable[[np.ndarray], float]] = {"perplexity.value": lambda drawn: perplexity(nll[drawn])}
    if reference_nll is not None and kl is not None and same_top is not None:
        metrics |= {
            "perplexity.ratio": lambda drawn: perplexity_ratio(nll[drawn], reference_nll[drawn]),
            "divergence.mean_kl": lambda drawn: float(kl[drawn].mean()),
            "divergence.p99_kl": lambda drawn: float(np.percentile(kl[drawn], 99)),
            "divergence.top1": lambda drawn: float(same_top[drawn].mean()),
        }
    return metrics
