"""What the formats of a quantized checkpoint have in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Sequence
from typing import Any, ClassVar, Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from llmopt.errors import InputError, LlmoptError
from llmopt.weights.quantized import QuantizedTensor
from llmopt.weights.scheme import Scheme

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

    @classmethod
    def check(cls, scheme: Scheme) -> None:
        """Raise InputError, naming what is possible, where the format does not hold the scheme."""
        if scheme.name not in cls.schemes:
            raise InputError(f"{cls.name} does not hold {scheme.name}; it holds {', '.join(cls.schemes)}")

    @classmethod
    @abstractmethod
    def for_scheme(
        cls,
        scheme: Scheme,
        ignore: Sequence[str] = ("lm_head",),
        desc_act: bool = False,
        damp: float | None = None,
    ) -> Self:
        """The settings to write a scheme with. Raises InputError where the format does not hold it.

        Args:
            scheme: with its group size settled.
            ignore: modules that stay dense.
            desc_act: inputs belong to groups in an order of their own, so that a group index is stored.
            damp: GPTQ's damping, recorded where the format has a place for it.
        """

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


def to_float16(scales: Tensor, where: str) -> Tensor:
    """Scales in float16. Raises LlmoptError where one is not finite there, as nothing that reads it could work."""
    half = scales.to(torch.float16)
    if not torch.isfinite(half).all():
        worst = scales.abs().max().item()
        raise LlmoptError(f"{where}: a scale of {worst:g} does not fit into float16, whose largest number is 65504")
    return half


def zero_points(module: str, weight: QuantizedTensor) -> Tensor:
    """The zero points, uint8 [out, groups], also where they are all the middle code. Each must be a code itself."""
    zeros = torch.full(weight.scales.shape, weight.middle, dtype=torch.uint8) if weight.zeros is None else weight.zeros
    if int(zeros.max()) >= 1 << weight.bits:
        raise LlmoptError(f"{module}: a zero point of {int(zeros.max())} does not fit into {weight.bits} bits")
    return zeros


def expect(module: str, weight: QuantizedTensor, bits: int, symmetric: bool, group_size: int | None) -> None:
    """Raise LlmoptError where a weight is not what the settings of its checkpoint promise.

    `group_size` is None for one group a row.
    """
    groups = 1 if group_size is None else -(-weight.shape[1] // group_size)
    if weight.bits != bits or weight.is_symmetric != symmetric or weight.scales.shape[1] != groups:
        raise LlmoptError(
            f"{module} is in {weight.bits} bits, {'symmetric' if weight.zeros is None else 'asymmetric'}, "
            f"{weight.scales.shape[1]} groups; its checkpoint's settings say {bits} bits, "
            f"{'symmetric' if symmetric else 'asymmetric'}, {groups} groups"
        )


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
