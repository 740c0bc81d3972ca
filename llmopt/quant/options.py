"""What a user asks of a quantization: the flags of `llmopt quantize`, and the keys of a recipe file."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from llmopt.errors import InputError
from llmopt.weights.scheme import nearest

KEEP = "keep"


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class Override(_Strict):
    """Other settings for some linear layers.

    Attributes:
        modules: a regular expression that is searched for in full names such as model.layers.0.mlp.up_proj.
        scheme: the scheme of those layers, or `keep` to leave them as they are.
        group_size: as for all.
    """

    modules: str
    scheme: str
    group_size: int | None = None


class Export(_Strict):
    """One artifact.

    Attributes:
        output: a folder, or FILE.gguf.
        format: None for the method's own.
    """

    output: str
    format: str | None = None


class Options(_Strict):
    """Everything that decides what bytes are written.

    Attributes:
        model: named as on the command line.
        exports: what to write; all hold the same codes.
        method: `rtn`, `gptq`, `awq` or `smoothquant`.
        quantizer: `native`, or the package to run in its own environment.
        scheme: of all linear layers that no override names; or a mix of GGUF types, such as q4_k_m.
        group_size: weights that share a scale, -1 for whole rows, None for the largest usual one that divides them.
        target_bpw: mean bits of a weight in linear layers; sensitive ones get wider schemes than others.
        desc_act: form GPTQ's groups in the order of activation energy.
        damp: GPTQ's damping, a share of the Hessian's mean diagonal.
        ignore: regular expressions; a linear layer whose full name one of them matches stays as it is.
        overrides: the last one that matches a layer counts; `ignore` goes before all.
        calibration: a file, a dataset, `self` or `builtin`; None for `self` where the method needs any.
        samples, seq_len: how many calibration samples, of how many tokens.
        seed: the same seed gives the same bytes.
        device: where calibration runs.
    """

    model: str
    exports: tuple[Export, ...]
    method: str = "gptq"
    quantizer: Literal["native", "auto-gptq", "autoawq"] = "native"
    scheme: str = "w4a16"
    group_size: int | None = None
    target_bpw: float | None = None
    desc_act: bool = False
    damp: float = 0.01
    ignore: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()
    calibration: str | None = None
    samples: int = 64
    seq_len: int = 512
    seed: int = 0
    device: str = "auto"


def make_options(given: Mapping[str, Any], where: str = "") -> Options:
    """Options from plain values. Raises InputError, one line, for an unknown key (with the nearest known one) or a
    value of a wrong type; `where` begins the line."""
    try:
        # Strict, but for lists where tuples are meant: files and callers have lists.
        return Options.model_validate(_tuples(given))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            known = _keys_at(first["loc"])
            raise InputError(
                f"{where}unknown key {key!r}{nearest(str(first['loc'][-1]), known)}; known: {', '.join(known)}"
            ) from None
        raise InputError(f"{where}{key}: {first['msg']}, not {str(first.get('input'))[:60]!r}") from None


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _tuples(member) for key, member in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _keys_at(place: tuple[int | str, ...]) -> list[str]:
    """The keys that are known where an unknown one was found."""
    nested: dict[str, type[BaseModel]] = {"exports": Export, "overrides": Override}
    kind = nested.get(str(place[0]), Options) if len(place) > 1 else Options
    return list(kind.model_fields)
