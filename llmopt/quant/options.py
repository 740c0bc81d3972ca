"""What a user asks of a quantization: the flags of `llmopt quantize`, and the keys of a recipe file."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from llmopt.errors import InputError
from llmopt.weights.scheme import nearest

KEEP = "keep"

_Model = TypeVar("_Model", bound=BaseModel)

Place = tuple[int | str, ...]
"""The keys and numbers of entries that lead to a value."""


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class Override(Strict):
    """Other settings for some linear layers.

    Attributes:
        modules: a regular expression that is searched for in full names such as model.layers.0.mlp.up_proj.
        scheme: the scheme of those layers, or `keep` to leave them as they are.
        group_size: as for all.
    """

    modules: str
    scheme: str
    group_size: int | None = None


class Export(Strict):
    """One artifact.

    Attributes:
        output: a folder, or FILE.gguf.
        format: None for the method's own.
    """

    output: str
    format: str | None = None


class Options(Strict):
    """Everything that decides what bytes are written.

    Attributes:
        model: named as on the command line.
        exports: what to write; all hold the same codes.
        method: `rtn`, `gptq`, `awq` or `smoothquant`.
        quantizer: `native`, or the package to run in its own environment.
        scheme: of all linear layers that no override names; or a mix of GGUF types, such as q4_k_m.
        group_size: weights that share a scale, -1 for whole rows, None for the largest usual one that divides them.
        head: the scheme of a folder's output layer, which is rounded to nearest whatever the method is; None leaves it
            as the model has it.
        target_bpw: mean bits of a weight in linear layers; sensitive ones get wider schemes than others.
        desc_act: form GPTQ's groups in the order of activation energy.
        damp: GPTQ's damping, a share of the Hessian's mean diagonal.
        ignore: regular expressions; a linear layer whose full name one of them matches stays as it is.
        overrides: the last one that matches a layer counts; `ignore` goes before all.
        calibration: a file, a dataset, `self` or `builtin`; None for `self` where the method needs any.
        samples, seq_len: how many calibration samples, of how many tokens.
        seed: the same seed gives the same bytes.
        device: where calibration runs.
        spill: whether the samples' activations go to the disk; None where they would take much of the free memory.
    """

    model: str
    exports: tuple[Export, ...]
    method: str = "gptq"
    quantizer: Literal["native", "auto-gptq", "autoawq"] = "native"
    scheme: str = "w4a16"
    group_size: int | None = None
    head: str | None = None
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
    spill: bool | None = None


def make_options(given: Mapping[str, Any], where: Callable[[Place], str] = lambda place: "") -> Options:
    """Options from plain values, with lists where tuples are meant. Raises InputError as `validated` does."""
    return validated(Options, given, where)


def validated(kind: type[_Model], given: Mapping[str, Any], where: Callable[[Place], str]) -> _Model:
    """A strict model from plain values. Raises InputError, one line, for an unknown key (with the nearest known one) or
    a value of a wrong type; `where` gives the beginning of the line."""
    try:
        return kind.model_validate(_tuples(given))
    except ValidationError as error:
        # An unknown key before all else, because it is often why another seems missing.
        found = error.errors(include_url=False)
        first = next((wrong for wrong in found if wrong["type"] == "extra_forbidden"), found[0])
        place = first["loc"]
        key = ".".join(map(str, place))
        if first["type"] == "extra_forbidden":
            known = list(_model_at(kind, place).model_fields)
            hint = nearest(str(place[-1]), known)
            raise InputError(f"{where(place)}unknown key {key!r}{hint}; known: {', '.join(known)}") from None
        if first["type"] == "missing":
            raise InputError(f"{where(place)}{key} is missing") from None
        message = first["msg"].removeprefix("Value error, ").replace("tuple", "list")
        raise InputError(f"{where(place)}{key}: {message}, not {str(first.get('input'))[:60]!r}") from None


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _tuples(member) for key, member in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _model_at(kind: type[BaseModel], place: Place) -> type[BaseModel]:
    """The model whose key was not known: that of the list's members, where it lies within one."""
    members: dict[str, type[BaseModel]] = {"exports": Export, "overrides": Override}
    return members.get(str(place[0]), kind) if len(place) > 1 else kind
