import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from llmopt.errors import LlmoptError
from llmopt.weights.checkpoint import SafetensorsCheckpoint
from llmopt.weights.shards import ShardWriter


def write(folder: Path, tensors: dict[str, torch.Tensor], shard_bytes: int) -> ShardWriter:
    writer = ShardWriter(folder, shard_bytes)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    return writer


def test_what_fits_goes_into_one_file(tmp_path: Path) -> None:
    tensors = {"a": torch.rand(3, 4), "b": torch.arange(5), "c": torch.rand(2).bfloat16()}
    writer = write(tmp_path, tensors, 1000)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert writer.size_bytes == 3 * 4 * 4 + 5 * 8 + 2 * 2
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_are_full_and_indexed(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(5)}  # 40 bytes each
    write(tmp_path, tensors, 100)
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "model.safetensors.index.json"])
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 200}
    assert index["weight_map"] == dict(zip(tensors, [names[0]] * 2 + [names[1]] * 2 + [names[2]], strict=True))
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert all(torch.equal(checkpoint.load(name), tensor) for name, tensor in tensors.items())


def test_transformers_reads_the_shards(tiny_model, tmp_path: Path) -> None:
    import transformers

    folder, model = tiny_model("llama")
    write(tmp_path, model.state_dict(), 50_000)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(read[name], tensor) for name, tensor in model.state_dict().items())


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, {"small": torch.ones(1), "large": torch.ones(100), "last": torch.ones(1)}, 50)
    assert len(list(tmp_path.glob("model-*-of-00003.safetensors"))) == 3


def test_nothing_is_held_in_memory(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 100)
    for i in range(6):
        writer.add(f"t{i}", torch.ones(10))
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) >= 40 * (i + 1)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2  # and the third in the making


def test_tensors_that_share_memory_are_written_apart(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    writer = ShardWriter(tmp_path)
    writer.add("turned", base.T)
    writer.add("row", base[1])
    writer.add("same", base)
    base.zero_()  # what was added is a copy
    writer.close()
    read = load_file(tmp_path / "model.safetensors")
    original = torch.arange(12.0).view(3, 4)
    assert torch.equal(read["turned"], original.T)
    assert torch.equal(read["row"], original[1])
    assert torch.equal(read["same"], original)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_nan_is_refused_by_name(tmp_path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(LlmoptError, match=r"layer\.weight holds values that are not finite"):
        ShardWriter(tmp_path).add("layer.weight", torch.tensor([1.0, float("nan")]).to(dtype))


def test_infinity_and_repeated_names_are_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 4)
    with pytest.raises(LlmoptError, match="not finite"):
        writer.add("a", torch.tensor([float("inf")]))
    for name in ("a", "b"):
        writer.add(name, torch.ones(1))
    for name in ("a", "b"):  # one is on the disk by now, the other is not
        with pytest.raises(LlmoptError, match="twice"):
            writer.add(name, torch.ones(1))
