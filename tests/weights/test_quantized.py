"""The canonical form: what codes, scales, zero points and minimums stand for, whatever part of it is looked at."""

import pytest
import torch

from llmopt.weights import quantized
from llmopt.weights.numbers import all_finite
from llmopt.weights.quantized import QuantizedTensor, TwoLevel, row_parts


def codes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 16, shape, dtype=torch.uint8)


WEIGHTS = {
    "symmetric": QuantizedTensor(codes(50, 64), torch.rand(50, 2).half(), None, None, 4),
    "ordered": QuantizedTensor(codes(50, 64), torch.rand(50, 2).half(), codes(50, 2), codes(64).int() % 2, 4),
    "k": QuantizedTensor(
        codes(50, 256), TwoLevel(codes(50, 8), torch.rand(50, 1).half()), None, None, 4,
        minimums=TwoLevel(codes(50, 8), torch.rand(50, 1).half()),
    ),
    "fp4": QuantizedTensor(
        codes(50, 32), TwoLevel(torch.rand(50, 2).to(torch.float8_e4m3fn), torch.tensor([[0.5]])), None, None, 4,
        number="fp4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_dequantized_in_parts_it_is_the_same(kind: str, dtype: torch.dtype, monkeypatch) -> None:
    weight = WEIGHTS[kind]
    whole = weight.dequantize(dtype)
    for elements in (1, 1000, 64 * 50):
        monkeypatch.setattr(quantized, "ELEMENTS_AT_ONCE", elements)
        parts = list(row_parts(weight))
        assert (len(parts) > 1) == (elements < weight.codes.numel())
        assert torch.equal(weight.dequantize(dtype), whole)
        assert torch.equal(torch.cat([weight.select_rows(rows).dequantize(dtype) for rows in parts]), whole)
    assert whole.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_is_found(dtype: torch.dtype, value: float) -> None:
    tensor = torch.zeros(3, 5).to(dtype)
    assert all_finite(tensor)
    tensor[2, 4] = value
    assert not all_finite(tensor)
