from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmopt.errors import InputError, LlmoptError
from llmopt.weights.formats import find_format
from llmopt.weights.formats.awq import AWQ
from llmopt.weights.scheme import PER_CHANNEL, find_scheme


def value(words: torch.Tensor, row: int, column: int) -> int:
    """The documented layout: half-byte i of word c is column 8c + [0, 2, 4, 6, 1, 3, 5, 7][i]."""
    place = [0, 2, 4, 6, 1, 3, 5, 7].index(column % 8)
    return int(words[row, column // 8]) >> (4 * place) & 0xF


def by_the_layout(tensors: dict[str, torch.Tensor], group_size: int) -> torch.Tensor:
    qweight, qzeros, scales = (tensors[f"m.{name}"] for name in ("qweight", "qzeros", "scales"))
    weight = torch.empty(scales.shape[1], qweight.shape[0])
    for o in range(weight.shape[0]):
        for i in range(weight.shape[1]):
            g = i // group_size
            weight[o, i] = scales[g, o].float() * (value(qweight, i, o) - value(qzeros, g, o))
    return weight


@given(words=st.integers(1, 4), groups=st.integers(1, 4), group_size=st.integers(1, 20), seed=st.integers(0, 1000))
def test_round_trip(weight, same, words: int, groups: int, group_size: int, seed: int) -> None:
    original = weight(8 * words, groups * group_size, group_size, 4, False, seed=seed)
    written = AWQ(group_size)
    same(find_format(written.config()).decode("m", written.encode("m", original).__getitem__), original)


def test_the_layout_is_the_documented_one(weight) -> None:
    original = weight(24, 30, 10, 4, False)
    tensors = AWQ(10).encode("m", original)
    assert torch.equal(by_the_layout(tensors, 10), original.dequantize())
    assert {name: (str(t.dtype), tuple(t.shape)) for name, t in tensors.items()} == {
        "m.qweight": ("torch.int32", (30, 3)),
        "m.qzeros": ("torch.int32", (3, 3)),
        "m.scales": ("torch.float16", (3, 24)),
    }


def test_whole_rows(weight, same) -> None:
    original = weight(8, 40, 40, 4, False)
    written = AWQ.for_schemes({"m": find_scheme("w4a16-asym").with_group_size(PER_CHANNEL)})
    assert written.config()["group_size"] == -1
    same(written.decode("m", written.encode("m", original).__getitem__), original)


def test_transformers_reads_the_config() -> None:
    from transformers import AwqConfig

    read = AwqConfig.from_dict(AWQ(64, ("lm_head",)).config())
    assert (read.bits, read.group_size, read.zero_point, read.modules_to_not_convert) == (4, 64, True, ["lm_head"])


def test_what_awq_does_not_hold_is_refused(weight) -> None:
    with pytest.raises(InputError, match="awq does not hold w4a16; it holds w4a16-asym"):
        AWQ.for_schemes({"m": find_scheme("w4a16").with_group_size(64)})
    with pytest.raises(InputError, match="desc-act"):
        AWQ.for_schemes({"m": find_scheme("w4a16-asym").with_group_size(64)}, desc_act=True)
    with pytest.raises(InputError, match="one group size"):
        AWQ.for_schemes({str(size): find_scheme("w4a16-asym").with_group_size(size) for size in (32, 64)})


def test_dense_modules_are_named() -> None:
    written = AWQ.for_schemes({"a": find_scheme("w4a16-asym").with_group_size(64), "b": find_scheme("f16")})
    assert written.config()["modules_to_not_convert"] == ["lm_head", "b"]
    assert find_format(written.config()) == written


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": torch.full((8, 2), 1e5)}, "float16"),
        ({"zeros": None}, "symmetric"),
        ({"zeros": torch.full((8, 2), 16, dtype=torch.uint8)}, "zero point of 16"),
        ({"group_index": torch.zeros(64, dtype=torch.int32)}, "group index"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weight, change, message) -> None:
    with pytest.raises(LlmoptError, match=message):
        AWQ(32).encode("m", replace(weight(8, 64, 32, 4, False), **change))


def test_outputs_that_do_not_fill_words_are_refused(weight) -> None:
    with pytest.raises(LlmoptError, match="multiple of the 8"):
        AWQ(32).encode("m", weight(12, 64, 32, 4, False))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("qweight", torch.zeros(64, 2)),
        ("scales", torch.zeros(3, 8)),
        ("scales", torch.zeros(2, 16)),
        ("scales", torch.full((2, 8), float("inf"))),
        ("qzeros", torch.zeros(1, 1, dtype=torch.int32)),
    ],
)
def test_damaged_modules_are_refused(weight, name: str, tensor: torch.Tensor) -> None:
    tensors = AWQ(32).encode("m", weight(8, 64, 32, 4, False)) | {f"m.{name}": tensor}
    with pytest.raises(InputError, match=r"m\."):
        AWQ(32).decode("m", tensors.__getitem__)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "gemv"}, "gemv"),
        ({"bits": 8}, "bits"),
        ({"zero_point": False}, "zero_point"),
        ({"group_size": -2}, "group_size is -2"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert"),
    ],
)
def test_configs_that_cannot_be_read_are_refused_by_name(change, message) -> None:
    with pytest.raises(InputError, match=message):
        find_format({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"} | change)
