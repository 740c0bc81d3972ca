"""Rotations as config.json and GGUF headers describe them."""

from collections.abc import Mapping
from dataclasses import replace
from math import log
from typing import Any

from llmopt.errors import InputError
from llmopt.model.config import Fields, Rope


def ropes_from_hf(values: Mapping[str, Any], where: str, *, local: bool, partial: bool) -> tuple[Rope, Rope | None]:
    """The rotation of most layers, and that of layers with windows where it is another.

    `local` says whether the family knows the latter, `partial` whether it is one of Phi-3's kind, which may rotate a
    part of each head only and stretch by longrope. Raises InputError for what is not known or makes no sense.
    """
    parameters = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise InputError(f"{where}: the rope scaling must be an object, not {parameters!r:.60}")
    if not local:
        return _rope_from_hf(values, parameters, values.get("rope_theta"), where, partial), None
    # transformers 5 has an object for each kind of layer, 4 only the bases of both and the scaling of the full ones.
    nested = {kind: parameters.get(kind) for kind in ("full_attention", "sliding_attention")}
    if not all(each is None or isinstance(each, dict) for each in nested.values()):
        raise InputError(f"{where}: rope_parameters must hold an object for each kind of layer, not {parameters!r:.60}")
    full = nested["full_attention"] or ({} if any(nested.values()) else parameters)
    theta, local_theta = values.get("rope_theta") or 1e6, values.get("rope_local_base_freq") or 1e4
    return (
        _rope_from_hf(values, full, theta, where, partial),
        _rope_from_hf(values, nested["sliding_attention"] or {}, local_theta, where, partial),
    )


def _rope_from_hf(
    values: Mapping[str, Any], parameters: Mapping[str, Any], theta: Any, where: str, partial: bool
) -> Rope:
    """A rotation by its `rope_parameters`; what these leave out is `theta`, or stands in config.json itself."""
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if partial and kind in ("su", "yarn"):  # what the first releases of Phi-3 call it
        kind = "longrope"
    outer = {"partial_rotary_factor": values.get("partial_rotary_factor"), "rope_theta": theta}
    fields = Fields({**outer, **parameters}, where)
    share = fields.number("partial_rotary_factor", 1.0) if partial else 1.0
    rope = Rope(fields.number("rope_theta", 10000.0), partial=share)
    if kind == "default":
        return rope
    if kind == "linear":
        return replace(rope, kind="linear", factor=fields.number("factor"))
    if kind == "llama3":
        return replace(
            rope,
            kind="llama3",
            factor=fields.number("factor"),
            low_freq_factor=fields.number("low_freq_factor"),
            high_freq_factor=fields.number("high_freq_factor"),
            original_max_position=fields.integer("original_max_position_embeddings"),
        )
    if kind == "longrope" and partial:
        return _longrope(rope, values, fields)
    raise InputError(
        f"{where}: the rope scaling {kind!r} is not supported; known: default, linear, llama3, and for Phi-3 longrope"
    )


def _longrope(rope: Rope, values: Mapping[str, Any], fields: Fields) -> Rope:
    """The attention factor is sqrt(1 + ln s / ln L) where nothing else is said: L the length that the model was first
    trained for, s how often that goes into its length now (arXiv:2402.13753)."""
    first = values.get("original_max_position_embeddings") or fields.values.get("original_max_position_embeddings")
    original = Fields({"original_max_position_embeddings": first}, fields.where).integer(
        "original_max_position_embeddings"
    )
    if original < 2:
        raise InputError(f"{fields.where}: original_max_position_embeddings must be at least 2, not {original}")
    longest = Fields(values, fields.where).integer("max_position_embeddings", original)
    stretch = fields.number("factor", longest / original)
    usual = (1 + log(stretch) / log(original)) ** 0.5 if stretch > 1 else 1.0
    return replace(
        rope,
        kind="longrope",
        original_max_position=original,
        short_factors=_factors(fields, "short_factor"),
        long_factors=_factors(fields, "long_factor"),
        attention_factor=fields.number("attention_factor", usual),
    )


def _factors(fields: Fields, name: str) -> tuple[float, ...]:
    factors = fields.values.get(name)
    if not isinstance(factors, list) or not all(isinstance(f, int | float) and f > 0 for f in factors):
        raise InputError(f"{fields.where}: {name} must be a list of positive numbers, not {factors!r:.60}")
    return tuple(float(factor) for factor in factors)


def rope_from_gguf(fields: Fields, theta: float, factors: list[float] | None) -> Rope:
    """The rotation in a GGUF header; `factors` is the content of its `rope_freqs` tensor, where it has one."""
    kind = fields.values.get("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise InputError(f"{fields.where}: the rope scaling {kind!r} is not supported; known: none, linear")
    if kind == "linear":
        return Rope(theta, "linear", fields.number("rope.scaling.factor"))
    if factors is None:
        return Rope(theta)
    # The file holds only the resulting divisors. The largest is the factor; the frequency bounds have been the same in
    # every Llama 3 release. Whoever builds the rotation checks it against the file's divisors.
    original = fields.integer("rope.scaling.original_context_length", Rope.original_max_position)
    return Rope(theta, "llama3", factor=round(max(factors), 4), original_max_position=original)
