"""The plan of a quantization: what it refuses, and what it promises."""

from pathlib import Path

import pytest

from llmopt.model.source import open_source
from llmopt.quant.export import parameter_order
from llmopt.quant.pipeline import quantize

SMALL = {"samples": 4, "seq_len": 64, "calibration": "builtin"}


@pytest.mark.parametrize(
    "kind",
    [
        {"method": "gptq", "scheme": "w4a16", "group_size": 32},
        {"method": "rtn", "scheme": "w3a16-asym", "format": "gptq", "group_size": 32},
        {"method": "awq", "scheme": "w4a16-asym", "format": "awq", "group_size": 32},
        *({"method": "rtn", "scheme": scheme} for scheme in ("w8a8", "fp8", "nvfp4", "mxfp4")),
        {"method": "rtn", "scheme": "w8a16", "group_size": 32},
    ],
)
def test_shapes_are_known_from_the_headers(kind: dict, tiny_model, tmp_path: Path) -> None:
    folder, _ = tiny_model("qwen2")
    options = SMALL if kind["method"] != "rtn" else {}
    quantize(str(folder), str(tmp_path / "out"), **{"format": "compressed-tensors"} | kind | options)
    source = open_source(str(tmp_path / "out"))
    for name, shape in parameter_order(source).items():
        assert source.shape(name) == tuple(source.weight(name).shape) == shape


def test_shapes_are_known_from_a_gguf_header(tiny_model, tmp_path: Path) -> None:
    folder, _ = tiny_model("llama")
    quantize(str(folder), str(tmp_path / "out.gguf"), method="rtn", scheme="q8_0")
    source = open_source(str(tmp_path / "out.gguf"))
    for name, shape in parameter_order(source).items():
        assert source.shape(name) == tuple(source.weight(name).shape) == shape
