"""What the formats of a quantized checkpoint have in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Mapping
from typing import Any, ClassVar, Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from llmopt.errors import InputError, LlmoptError
from llmopt.weights.numbers import INT
from llmopt.weights.quantized import QuantizedTensor, Scales
from llmopt.weights.scheme import PER_CHANNEL, Scheme

HEAD = "lm_head"
Load = Callable[[str], Tensor]
"""Reads one tensor of a checkpoint by its name; raises InputError where there is none."""


class Format(ABC):
    """How quantized modules lie in a safetensors checkpoint, with the settings that its config.json gives.

    A module is a linear layer by its name in the checkpoint, such as `model.layers.0.mlp.up_proj`. What a checkpoint
    does not hold in this form is dense, whatever the settings say.
    """

    name: ClassVar[str]
    schemes: ClassVar[tuple[str, ...]]
    """The schemes that can be written, by their names on the command line."""
    quantizes_head: ClassVar[bool] = True
    """Whether runtimes that read the format look for a quantized head."""

    @classmethod
    def check(cls, scheme: Scheme) -> None:
        """Raise InputError, naming what is possible, where the format does not hold the scheme."""
        if scheme.name not in cls.schemes:
            raise InputError(f"{cls.name} does not hold {scheme.name}; it holds {', '.join(cls.schemes)}")

    @classmethod
    @abstractmethod
    def for_schemes(cls, schemes: Mapping[str, Scheme], desc_act: bool = False, damp: float | None = None) -> Self:
        """The settings to write these schemes with. Raises InputError where the format does not hold them.

        Args:
            schemes: of each linear layer by its full name, with group sizes settled; 16-bit ones stay dense, and so
                does `lm_head` where it is not named.
            desc_act: inputs belong to groups in an order of their own, so that a group index is stored.
            damp: GPTQ's damping, recorded where the format has a place for it.
        """

    @classmethod
    def split(cls, schemes: Mapping[str, Scheme]) -> tuple[dict[str, Scheme], tuple[str, ...]]:
        """The schemes of the modules that are to be quantized, each checked, and the modules that stay dense."""
        quantized = {module: scheme for module, scheme in schemes.items() if not scheme.is_dense}
        if not quantized:
            raise InputError("every module is to stay as it is, so that nothing is left to quantize")
        for scheme in set(quantized.values()):
            cls.check(scheme)
            if scheme.group_size is None:
                raise ValueError(f"the group size of {scheme.name} is not settled")
        dense = [module for module in schemes if module not in quantized and module != HEAD]
        return quantized, tuple(dense if HEAD in quantized else [HEAD, *dense])

    @classmethod
    @abstractmethod
    def parse(cls, config: dict[str, Any]) -> Self:
        """The settings in a `quantization_config`. Raises InputError, naming it, for what cannot be read."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The `quantization_config` of config.json."""

    @abstractmethod
    def holds(self, module: str, names: Container[str]) -> bool:
        """Whether a checkpoint with tensors of these names holds the module in this format."""

    @abstractmethod
    def encode(self, module: str, weight: QuantizedTensor) -> dict[str, Tensor]:
        """The tensors of a module, by their names in the checkpoint. Raises LlmoptError where they cannot hold it."""

    @abstractmethod
    def decode(self, module: str, load: Load) -> QuantizedTensor:
        """A module from its tensors. Raises InputError where one is missing or does not fit the others."""

    @abstractmethod
    def shape(self, module: str, load: Load) -> tuple[int, int]:
        """Outputs and inputs of a module; what `load` gives may be on the meta device, but for tensors of one or two
        numbers. Raises InputError where its tensors are missing."""


class Settings(BaseModel):
    """A part of a `quantization_config`. Values of a wrong type are refused; fields that are not listed are left."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


_Settings = TypeVar("_Settings", bound=Settings)


def parse_settings(kind: type[_Settings], config: dict[str, Any], format_name: str) -> _Settings:
    """Read settings, or raise InputError with one line that names the first field that cannot be read."""
    try:
        return kind.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        given = "" if first["type"] == "missing" else f", not {str(first['input'])[:60]!r}"
        raise InputError(
            f"quantization_config of {format_name}, {field or 'as a whole'}: {first['msg']}{given}"
        ) from None


def to_float16(scales: Scales, where: str) -> Tensor:
    """Scales in float16. Raises LlmoptError where one is not finite there, as nothing that reads it could work."""
    half = scales.float().to(torch.float16)
    if not torch.isfinite(half).all():
        worst = scales.float().abs().max().item()
        raise LlmoptError(f"{where}: a scale of {worst:g} does not fit into float16, whose largest number is 65504")
    return half


def zero_points(module: str, weight: QuantizedTensor) -> Tensor:
    """The zero points, uint8 [out, groups], also where they are all the middle code. Each must be a code itself."""
    zeros = torch.full(weight.scales.shape, weight.middle, dtype=torch.uint8) if weight.zeros is None else weight.zeros
    if int(zeros.max()) >= 1 << weight.bits:
        raise LlmoptError(f"{module}: a zero point of {int(zeros.max())} does not fit into {weight.bits} bits")
    return zeros


def groups_of(in_features: int, group_size: int) -> int:
    """How many groups a row has; the last one is short where the group size does not divide it."""
    return 1 if group_size == PER_CHANNEL else -(-in_features // group_size)


def expect(
    module: str, weight: QuantizedTensor, bits: int, symmetric: bool, group_size: int, number: str = INT
) -> None:
    """Raise LlmoptError where a weight is not what the settings of its checkpoint promise."""
    promised = _described(number, bits, symmetric, groups_of(weight.shape[1], group_size))
    given = _described(weight.number, weight.bits, weight.is_symmetric, weight.scales.shape[1])
    if given != promised:
        raise LlmoptError(f"{module} is in {given}; its checkpoint's settings say {promised}")
    if weight.minimums is not None:
        raise LlmoptError(f"{module} has minimums, which are not zero points: no checkpoint in safetensors holds them")


def _described(number: str, bits: int, symmetric: bool, groups: int) -> str:
    return f"{bits} bits ({number}), {'symmetric' if symmetric else 'asymmetric'}, {groups} groups"


def load_as(load: Load, name: str, shape: tuple[int | None, ...], dtype: torch.dtype | None) -> Tensor:
    """Load a tensor that must have this dtype (None: any floating point) and shape (None: any length but 0)."""
    tensor = load(name)
    fits = len(tensor.shape) == len(shape) and all(
        want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
    )
    right = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
    if not fits or not right or not tensor.numel():
        wanted = "x".join("?" if want is None else str(want) for want in shape)
        raise InputError(
            f"{name} is {tensor.dtype} of {'x'.join(map(str, tensor.shape))}, "
            f"not {dtype or 'floating point'} of {wanted}"
        )
    return tensor


def load_scales(load: Load, name: str, shape: tuple[int | None, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Load scales as `load_as` does. Raises InputError where one is NaN or infinite."""
    scales = load_as(load, name, shape, dtype)
    if not torch.isfinite(scales.float()).all():
        raise InputError(f"{name} holds scales that are not finite")
    return scales
