"""Calibration samples on their way through the model, in memory and on the disk."""

from pathlib import Path

import psutil
import pytest
import torch

from llmopt.backend.reference import ReferenceBackend
from llmopt.errors import LlmoptError
from llmopt.model.decoder import DecoderLayer
from llmopt.model.source import open_source
from llmopt.quant import activations, calibration
from llmopt.quant.activations import BatchesOnDisk, fit_in_memory, hold
from llmopt.quant.calibration import CalibrationSweep
from llmopt.quant.options import make_options
from llmopt.quant.pipeline import quantize, run

CPU = torch.device("cpu")
OPTIONS = {"method": "gptq", "scheme": "w4a16", "group_size": 32, "calibration": "builtin", "samples": 5, "seq_len": 64}


def test_batches_come_back_as_they_were_put(tmp_path: Path) -> None:
    given = [torch.rand(3, 4, 5), torch.rand(4, 3, 5).transpose(0, 1), torch.rand(1, 4, 5)]
    held = hold(iter(given), tmp_path / "activations", CPU)
    assert isinstance(held, BatchesOnDisk)
    assert (tmp_path / "activations").stat().st_size == 4 * sum(batch.numel() for batch in given)
    for _ in range(2):
        assert all(torch.equal(found, batch) for found, batch in zip(held, given, strict=True))
    for index, batch in enumerate(held):
        held[index] = batch + 1
    assert all(torch.equal(found, batch + 1) for found, batch in zip(held, given, strict=True))


def test_a_sweep_sees_the_same_either_way(tiny_model, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(calibration, "TOKENS_AT_ONCE", 70)  # several batches, the last of which is shorter
    source = open_source(str(tiny_model("qwen3")[0]))
    backend = ReferenceBackend("cpu")
    tokens = torch.randint(0, 256, (5, 32))
    sweeps = [CalibrationSweep(source, tokens, backend, spill_to=path) for path in (None, tmp_path / "activations")]
    assert len(sweeps[0].batches) == 3
    for index in range(source.config.num_layers):
        layer = DecoderLayer(source.config, index, source.layer(index), backend)
        seen = [sweep.observe(layer) for sweep in sweeps]
        for group in seen[0]:
            assert torch.equal(seen[0][group].full_gram(), seen[1][group].full_gram())
        for sweep in sweeps:
            sweep.advance(layer)
    assert all(torch.equal(a, b) for a, b in zip(*(sweep.batches for sweep in sweeps), strict=True))


def test_the_artifact_is_the_same_either_way(tiny_model, tmp_path: Path) -> None:
    folder, _ = tiny_model("llama")
    for name, spill in (("memory", False), ("disk", True)):
        quantize(str(folder), str(tmp_path / name), **OPTIONS, spill=spill)
    found = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("memory", "disk")]
    assert found[0] == found[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "memory"]


@pytest.mark.parametrize(
    ("free", "asked", "spills"), [(1 << 40, None, False), (1 << 10, None, True), (1 << 10, False, False)]
)
def test_they_go_to_the_disk_where_memory_is_short(
    tiny_model, tmp_path: Path, monkeypatch, free: int, asked: bool | None, spills: bool
) -> None:
    memory = psutil.virtual_memory()._replace(available=free)
    monkeypatch.setattr(activations.psutil, "virtual_memory", lambda: memory)
    assert fit_in_memory(torch.zeros(5, 64), 64) == (free > 1 << 10)
    seen = []

    def look(phase: str, done: int, total: int) -> None:
        if phase.startswith("quantizing"):
            seen.append((tmp_path / ".out.work" / "activations").exists())

    exports = [{"output": str(tmp_path / "out")}]
    run(
        make_options({"model": str(tiny_model("llama")[0]), "exports": exports, **OPTIONS, "spill": asked}), False, look
    )
    assert seen == [spills] * 3


def test_a_full_disk_is_said(tiny_model, tmp_path: Path, monkeypatch) -> None:
    def full(self, index: int, batch: torch.Tensor) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(BatchesOnDisk, "__setitem__", full)
    with pytest.raises(LlmoptError, match="is full; nothing was written"):
        quantize(str(tiny_model("llama")[0]), str(tmp_path / "out"), **OPTIONS, spill=True)
    assert [path.name for path in tmp_path.iterdir()] == [".out.work"]
    assert not (tmp_path / ".out.work" / "activations").exists()
