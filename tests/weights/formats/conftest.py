"""Random quantized weights, and a judge of whether two are the same."""

from collections.abc import Callable

import pytest
import torch

from llmopt.weights.quantized import QuantizedTensor


def make_weight(
    out_features: int,
    in_features: int,
    group_size: int,
    bits: int,
    symmetric: bool,
    *,
    act_order: bool = False,
    activations: str | None = None,
    seed: int = 0,
) -> QuantizedTensor:
    """A weight whose last group is short where the group size does not divide the inputs."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-in_features // group_size)
    codes = torch.randint(0, 1 << bits, (out_features, in_features), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 1 << bits, (out_features, groups), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(out_features, groups, generator=generator) + 0.01).half()
    index = (torch.arange(in_features) // group_size).int()
    if act_order:
        index = index[torch.randperm(in_features, generator=generator)]
    elif in_features % group_size == 0:
        index = None
    return QuantizedTensor(codes, scales, None if symmetric else zeros, index, bits, activations)


def check_same(left: QuantizedTensor, right: QuantizedTensor) -> None:
    assert (left.bits, left.activations) == (right.bits, right.activations)
    for name in ("codes", "scales", "zeros", "group_index"):
        mine, other = getattr(left, name), getattr(right, name)
        assert (mine is None) == (other is None), name
        if mine is not None:
            assert mine.shape == other.shape, name
            assert torch.equal(mine.double(), other.double()), name


@pytest.fixture(scope="session")
def weight() -> Callable[..., QuantizedTensor]:
    return make_weight


@pytest.fixture(scope="session")
def same() -> Callable[[QuantizedTensor, QuantizedTensor], None]:
    return check_same
