import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmopt.errors import InputError, LlmoptError
from llmopt.weights.checkpoint import SafetensorsCheckpoint
from llmopt.weights.formats import find_format
from llmopt.weights.formats.compressed_tensors import INTEGER, PACKED, CompressedTensors
from llmopt.weights.quantized import QuantizedTensor
from llmopt.weights.scheme import SCHEMES
from llmopt.weights.shards import ShardWriter

HELD = ["w4a16", "w8a16", "w8a8"]


def settled(name: str, group_size: int = 32) -> CompressedTensors:
    scheme = SCHEMES[name]
    return CompressedTensors.for_scheme(scheme if scheme.fixed_group else scheme.with_group_size(group_size))


@given(
    name=st.sampled_from(HELD),
    outputs=st.integers(1, 9),
    groups=st.integers(1, 4),
    group_size=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_round_trip(weight, same, name: str, outputs: int, groups: int, group_size: int, seed: int) -> None:
    written = settled(name, group_size)
    inputs = groups * group_size
    size = inputs if written.layout == INTEGER else group_size
    original = weight(outputs, inputs, size, written.bits, True, activations=written.activations, seed=seed)
    same(find_format(written.config()).decode("m", written.encode("m", original).__getitem__), original)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [8, 40])
def test_the_peer_decompresses_packed_weights_exactly(weight, bits: int, group_size: int) -> None:
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    written = settled("w4a16" if bits == 4 else "w8a16", group_size if group_size < 40 else -1)
    original = weight(6, 40, group_size, bits, True)
    tensors = {name.removeprefix("m."): t for name, t in written.encode("m", original).items()}
    scheme = QuantizationConfig.model_validate(written.config()).config_groups["group_0"]
    theirs = PackedQuantizationCompressor.decompress(tensors, scheme)["weight"]
    assert torch.equal(theirs, original.dequantize(theirs.dtype))


@pytest.mark.parametrize("bits", [4, 8])
def test_what_the_peer_compresses_is_read_exactly(weight, bits: int) -> None:
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    written = settled("w4a16" if bits == 4 else "w8a16", 8)
    original = weight(6, 40, 8, bits, True)
    scheme = QuantizationConfig.model_validate(written.config()).config_groups["group_0"]
    dense = {"weight": original.dequantize(), "weight_scale": original.scales.float()}
    theirs = PackedQuantizationCompressor.compress(dense, scheme)
    mine = written.decode("m", lambda name: theirs[name.removeprefix("m.")])
    assert torch.equal(mine.codes, original.codes)
    assert torch.equal(mine.dequantize(), original.dequantize())


@pytest.mark.parametrize("name", HELD)
def test_transformers_loads_a_checkpoint_and_sees_the_same_weights(tiny_model, tmp_path: Path, name: str) -> None:
    import transformers

    folder, _ = tiny_model("llama")
    written = settled(name)
    dense = write_quantized(folder, tmp_path, written)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        assert torch.isfinite(model(torch.arange(8)[None]).logits).all()  # decompression waits for the first call
    parameters = dict(model.named_parameters())
    assert len(dense) == 21
    for parameter, expected in dense.items():
        assert torch.equal(parameters[parameter], expected), parameter


def write_quantized(folder: Path, output: Path, written: CompressedTensors) -> dict[str, torch.Tensor]:
    """A copy of a checkpoint with its projections quantized; what they then are in float32."""
    source = SafetensorsCheckpoint(folder)
    writer = ShardWriter(output)
    dense = {}
    for name in source.names():
        if "proj" not in name:
            writer.add(name, source.load(name))
            continue
        quantized = rounded(source.load(name), written)
        dense[name] = quantized.dequantize()
        for part, tensor in written.encode(name.removesuffix(".weight"), quantized).items():
            writer.add(part, tensor)
    writer.close()
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": written.config()}
    (output / "config.json").write_text(json.dumps(config))
    return dense


def rounded(dense: torch.Tensor, written: CompressedTensors) -> QuantizedTensor:
    size = dense.shape[1] if written.group_size == -1 else written.group_size
    groups = dense.unflatten(1, (-1, size))
    scales = (groups.abs().amax(dim=2) / (2 ** (written.bits - 1) - 0.5)).half()
    middle = 1 << (written.bits - 1)
    codes = torch.round(groups / scales[..., None].float()).add(middle).clamp(0, 2 * middle - 1)
    return QuantizedTensor(codes.flatten(1).to(torch.uint8), scales, None, None, written.bits, written.activations)


def test_an_older_checkpoint_with_a_group_index_is_read(weight, same) -> None:
    original = weight(4, 32, 8, 4, True, act_order=True)
    written = settled("w4a16", 8)
    tensors = written.encode("m", replace(original, group_index=None)) | {"m.weight_g_idx": original.group_index}
    config = written.config()
    config["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    same(find_format(config).decode("m", tensors.__getitem__), original)
    tensors["m.weight_g_idx"] = torch.full((32,), 4, dtype=torch.int32)
    with pytest.raises(InputError, match="weight_g_idx"):
        find_format(config).decode("m", tensors.__getitem__)


def test_a_config_of_llm_compressor_is_read() -> None:
    weights = {
        "actorder": None, "block_structure": None, "dynamic": False, "group_size": 128, "num_bits": 4,
        "observer": "minmax", "observer_kwargs": {}, "strategy": "group", "symmetric": True, "type": "int",
    }  # fmt: skip
    group = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": weights}
    config = {
        "config_groups": {"group_0": group}, "format": "pack-quantized", "global_compression_ratio": 1.9,
        "ignore": ["lm_head"], "kv_cache_scheme": None, "quant_method": "compressed-tensors",
        "quantization_status": "compressed", "sparsity_config": {}, "transform_config": {}, "version": "0.9.0",
    }  # fmt: skip
    assert find_format(config) == CompressedTensors(PACKED, 4, 128)


def test_which_modules_it_holds() -> None:
    assert settled("w8a8").holds("a.b", {"a.b.weight", "a.b.weight_scale"})
    assert not settled("w8a8").holds("lm_head", {"lm_head.weight", "a.b.weight_scale"})


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format"], "marlin-24", "marlin-24"),
        (["quantization_status"], "frozen", "quantization_status"),
        (["kv_cache_scheme"], {"num_bits": 8}, "kv_cache_scheme"),
        (["sparsity_config"], {"format": "sparse-bitmask"}, "sparse-bitmask"),
        (["transform_config"], {"config_groups": {"u": {}}}, "transform_config"),
        (["config_groups"], {}, "0 config_groups"),
        (["config_groups", "group_0", "weights", "type"], "float", "weights.type"),
        (["config_groups", "group_0", "weights", "num_bits"], 3, "num_bits"),
        (["config_groups", "group_0", "weights", "symmetric"], False, "symmetric"),
        (["config_groups", "group_0", "weights", "group_size"], None, "group_size"),
        (["config_groups", "group_0", "weights", "strategy"], "block", "strategy"),
        (["config_groups", "group_0", "format"], "nvfp4-pack-quantized", "nvfp4"),
        (["config_groups", "group_0", "input_activations"], {"num_bits": 8, "strategy": "tensor"}, "input_activations"),
    ],
)
def test_configs_that_cannot_be_read_are_refused_by_name(path: list[str], value, message: str) -> None:
    config = settled("w4a16").config()
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(InputError, match=message) as caught:
        find_format(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("weight_packed", torch.zeros(4, 7, dtype=torch.int32)),
        ("weight_shape", torch.tensor([4, 1 << 60])),
        ("weight_shape", torch.tensor([4.0, 32.0])),
        ("weight_shape", torch.tensor([-4, -32])),
        ("weight_scale", torch.zeros(4, 3)),
        ("weight_scale", torch.zeros(5, 4)),
    ],
)
def test_damaged_modules_are_refused(weight, name: str, tensor: torch.Tensor) -> None:
    written = settled("w4a16", 8)
    tensors = written.encode("m", weight(4, 32, 8, 4, True)) | {f"m.{name}": tensor}
    with pytest.raises(InputError, match=r"m\.weight"):
        written.decode("m", tensors.__getitem__)


def test_4_bit_codes_outside_their_range_are_refused() -> None:
    tensors = {"m.weight": torch.full((2, 4), 8, dtype=torch.int8), "m.weight_scale": torch.ones(2, 1)}
    with pytest.raises(InputError, match="4 bits"):
        CompressedTensors(INTEGER, 4, -1).decode("m", tensors.__getitem__)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": torch.full((4, 4), float("inf"))}, "float16"),
        ({"activations": 8}, "rounds activations"),
        ({"group_index": torch.zeros(32, dtype=torch.int32)}, "group index"),
        ({"zeros": torch.zeros(4, 4, dtype=torch.uint8)}, "asymmetric"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weight, change, message: str) -> None:
    with pytest.raises(LlmoptError, match=message):
        settled("w4a16", 8).encode("m", replace(weight(4, 32, 8, 4, True), **change))
