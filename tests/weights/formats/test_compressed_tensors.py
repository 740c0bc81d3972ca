import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmopt.engine.config import EngineConfig
from llmopt.engine.scoring import Scorer
from llmopt.errors import InputError, LlmoptError
from llmopt.weights.checkpoint import SafetensorsCheckpoint
from llmopt.weights.formats import find_format
from llmopt.weights.formats.base import HEAD
from llmopt.weights.formats.compressed_layouts import LAYOUTS, Floats, Integers, PackedIntegers
from llmopt.weights.formats.compressed_tensors import CompressedTensors, ModuleGroup
from llmopt.weights.numbers import FP4, FP8, INT, codes_of, rounded
from llmopt.weights.quantized import QuantizedTensor, TwoLevel
from llmopt.weights.scheme import PER_CHANNEL, SCHEMES, Scheme
from llmopt.weights.shards import ShardWriter

HELD = CompressedTensors.schemes


def settled(name: str, group_size: int = 32) -> Scheme:
    scheme = SCHEMES[name]
    return scheme if scheme.fixed_group else scheme.with_group_size(group_size)


def format_of(name: str, group_size: int = 32) -> CompressedTensors:
    return CompressedTensors.for_schemes({"m": settled(name, group_size)})


def random_weight(scheme: Scheme, outputs: int, inputs: int, seed: int = 0) -> QuantizedTensor:
    """A weight with any code and any scale that the scheme knows."""
    generator = torch.Generator().manual_seed(seed)
    size = inputs if scheme.group_size == PER_CHANNEL else scheme.group_size
    shape = (outputs, inputs // size)
    codes = torch.randint(0, 1 << scheme.bits, (outputs, inputs), generator=generator, dtype=torch.uint8)
    scales = torch.rand(shape, generator=generator) + 0.01
    if scheme.number == FP8:
        codes[codes & 0x7F == 0x7F] = 0
    if scheme.scales == "fp8":
        factor = torch.tensor([[2.0 ** -(seed % 20)]])
        scales = TwoLevel((scales * 400).to(torch.float8_e4m3fn), factor)
    elif scheme.scales == "e8m0":
        exponents = torch.randint(90, 140, shape, generator=generator, dtype=torch.uint8)
        scales = exponents.view(torch.float8_e8m0fnu)
    elif scheme.scales == "float16":
        scales = scales.half()
    return QuantizedTensor(codes, scales, None, None, scheme.bits, scheme.activations, scheme.number)


def check_same(found: QuantizedTensor, expected: QuantizedTensor) -> None:
    for name in ("bits", "activations", "number", "zeros", "minimums", "group_index"):
        assert getattr(found, name) == getattr(expected, name), name
    assert torch.equal(found.codes, expected.codes)
    assert type(found.scales) is type(expected.scales)
    assert torch.equal(found.scales.float(), expected.scales.float())
    assert torch.equal(found.dequantize(), expected.dequantize())


@given(
    name=st.sampled_from(HELD),
    outputs=st.integers(1, 9),
    groups=st.integers(1, 4),
    group_size=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_round_trip(name: str, outputs: int, groups: int, group_size: int, seed: int) -> None:
    scheme, written = settled(name, group_size), format_of(name, group_size)
    size = group_size if scheme.group_size == PER_CHANNEL else scheme.group_size
    original = random_weight(scheme, outputs, groups * size, seed)
    tensors = written.encode("m", original)
    check_same(find_format(written.config()).decode("m", tensors.__getitem__), original)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fp8", {"weight": ("float8_e4m3fn", (6, 64)), "weight_scale": ("float32", (6, 1))}),
        (
            "nvfp4",
            {
                "weight_packed": ("uint8", (6, 32)),
                "weight_scale": ("float8_e4m3fn", (6, 4)),
                "weight_global_scale": ("float32", (1,)),
            },
        ),
        ("mxfp4", {"weight_packed": ("uint8", (6, 32)), "weight_scale": ("uint8", (6, 2))}),
    ],
)
def test_dtypes_and_shapes(name: str, expected: dict) -> None:
    tensors = format_of(name).encode("m", random_weight(settled(name), 6, 64))
    found = {key[2:]: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for key, t in tensors.items()}
    assert found == expected


# compressed-tensors itself is the judge of the layouts.


def peer(written: CompressedTensors):
    """compressed-tensors' own compressor and scheme of a checkpoint with one group."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    scheme = QuantizationConfig.model_validate(written.config()).config_groups["group_0"]
    return BaseCompressor.get_value_from_registry(scheme.format), scheme


CASES = [("w4a16", 8), ("w4a16", -1), ("w8a16", 8), ("w8a16", -1), ("w8a8", 0), ("fp8", 0), ("nvfp4", 0), ("mxfp4", 0)]


@pytest.mark.parametrize(("name", "group_size"), CASES)
def test_the_peer_decompresses_exactly(name: str, group_size: int) -> None:
    written = format_of(name, group_size)
    original = random_weight(settled(name, group_size), 6, 96, seed=7)
    compressor, scheme = peer(written)
    tensors = {key.removeprefix("m."): tensor for key, tensor in written.encode("m", original).items()}
    assert {key for key in tensors if key.startswith("weight")} == set(compressor.compression_param_names(scheme))
    theirs = compressor.decompress(tensors, scheme)["weight"]
    assert torch.equal(theirs, original.dequantize(theirs.dtype))


@pytest.mark.parametrize(("name", "group_size"), CASES)
def test_what_the_peer_compresses_is_read_exactly(name: str, group_size: int) -> None:
    written = format_of(name, group_size)
    original = random_weight(settled(name, group_size), 6, 96, seed=9)
    compressor, scheme = peer(written)
    dense = {"weight": original.dequantize(), "weight_scale": original.scales.float()}
    if isinstance(original.scales, TwoLevel):
        divisor = 1 / original.scales.factors.view(1)
        dense |= {"weight_scale": original.scales.values.float(), "weight_global_scale": divisor}
    theirs = compressor.compress(dense, scheme)
    mine = written.decode("m", lambda key: theirs[key.removeprefix("m.")])
    assert torch.equal(mine.dequantize(), original.dequantize())
    assert torch.equal(mine.scales.float(), original.scales.float())


@pytest.mark.parametrize("outputs", [9, 16])
def test_zero_points_of_the_peer_are_read(outputs: int) -> None:
    config = format_of("w4a16", 8).config()
    config["config_groups"]["group_0"]["weights"]["symmetric"] = False
    read = find_format(config)
    compressor, scheme = peer(read)
    scales = torch.rand(outputs, 5) + 0.1
    zeros = torch.randint(-8, 8, (outputs, 5), dtype=torch.int8)
    codes = torch.randint(-8, 8, (outputs, 40))
    dense = (codes - zeros.repeat_interleave(8, 1)) * scales.repeat_interleave(8, 1)
    theirs = compressor.compress({"weight": dense, "weight_scale": scales, "weight_zero_point": zeros}, scheme)
    mine = read.decode("m", lambda key: theirs[key.removeprefix("m.")])
    assert torch.equal(mine.codes, (codes + 8).to(torch.uint8))
    assert torch.equal(mine.zeros, (zeros + 8).to(torch.uint8))
    assert torch.equal(mine.dequantize(), compressor.decompress(theirs, scheme)["weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (1, 1), ()])
@pytest.mark.parametrize("name", ["fp8", "w8a8"])
def test_one_scale_for_the_whole_matrix_is_read(name: str, shape: tuple, dtype: torch.dtype) -> None:
    original = random_weight(settled(name), 5, 24)
    written = format_of(name)
    config = written.config()
    config["config_groups"]["group_0"]["weights"]["strategy"] = "tensor"
    tensors = written.encode("m", original) | {"m.weight_scale": torch.full(shape, 0.375, dtype=dtype)}
    found = find_format(config).decode("m", tensors.__getitem__)
    check_same(found, replace(original, scales=torch.full((5, 1), 0.375)))
    tensors["m.weight_scale"] = torch.ones(2, dtype=dtype)
    with pytest.raises(InputError, match="weight_scale"):
        find_format(config).decode("m", tensors.__getitem__)


def test_fp8_weights_alone_are_read() -> None:
    config = format_of("fp8").config() | {"format": "naive-quantized"}
    config["config_groups"]["group_0"] |= {"input_activations": None, "format": None}
    tensors = format_of("fp8").encode("m", random_weight(settled("fp8"), 4, 8))
    assert find_format(config).decode("m", tensors.__getitem__).activations is None


# transformers loads what is written.

MIXTURE = {"q_proj": "w8a16", "k_proj": "w8a16", "v_proj": "w8a16", "o_proj": "nvfp4", "gate_proj": "w4a16",
           "up_proj": "w4a16", "down_proj": "fp8"}  # fmt: skip


def nearest_codes(dense: torch.Tensor, scheme: Scheme) -> QuantizedTensor:
    """A matrix rounded to the nearest codes of a scheme."""
    size = dense.shape[1] if scheme.group_size == PER_CHANNEL else scheme.group_size
    groups = dense.unflatten(1, (-1, size))
    reach = {INT: (1 << (scheme.bits - 1)) - 0.5, FP4: 6.0, FP8: 448.0}[scheme.number]
    scales = groups.abs().amax(2) / reach
    if scheme.scales == "fp8":
        scales = TwoLevel((scales * 2048).to(torch.float8_e4m3fn), torch.tensor([[1 / 2048]]))
    elif scheme.scales == "e8m0":
        scales = torch.exp2(scales.log2().ceil()).to(torch.float8_e8m0fnu)
    elif scheme.scales == "float16":
        scales = scales.half()
    middle = 1 << (scheme.bits - 1) if scheme.number == INT else 0
    numbers = rounded(groups / scales.float()[..., None] + middle, scheme.number, scheme.largest_code)
    codes = codes_of(numbers, scheme.number).flatten(1)
    return QuantizedTensor(codes, scales, None, None, scheme.bits, scheme.activations, scheme.number)


def write_quantized(folder: Path, output: Path, schemes: dict[str, Scheme]) -> dict[str, torch.Tensor]:
    """A copy of a checkpoint with these modules quantized; what they then are in float32, by parameter."""
    source, writer, dense = SafetensorsCheckpoint(folder), ShardWriter(output), {}
    written = CompressedTensors.for_schemes(schemes)
    for name in source.names():
        module = name.removesuffix(".weight")
        if module not in schemes or schemes[module].is_dense:
            writer.add(name, source.load(name))
            continue
        quantized = nearest_codes(source.load(name), schemes[module])
        dense[name] = quantized.dequantize()
        for part, tensor in written.encode(module, quantized).items():
            writer.add(part, tensor)
    writer.close()
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": written.config()}
    (output / "config.json").write_text(json.dumps(config))
    return dense


def schemes_for(folder: Path, which: str) -> dict[str, Scheme]:
    """One scheme for all projections, or the mixture, in which the last layer stays dense."""
    modules = [name.removesuffix(".weight") for name in SafetensorsCheckpoint(folder).names() if "proj" in name]
    if which != "mixed":
        return {module: settled(which) for module in modules}
    return {
        module: SCHEMES["f16"] if ".2." in module else settled(MIXTURE[module.rsplit(".", 1)[1]]) for module in modules
    }


@pytest.mark.parametrize("which", [*HELD, "mixed"])
def test_transformers_loads_a_checkpoint_and_computes_the_same(tiny_model, tmp_path: Path, which: str) -> None:
    import transformers

    folder, _ = tiny_model("llama")
    dense = write_quantized(folder, tmp_path, schemes_for(folder, which))
    tokens = list(range(3, 60))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    model.hf_quantizer.compressor.decompress_model(model)  # would wait for the first call
    torch.nn.Module.float(model)  # FP4 comes out in bfloat16, which holds it exactly
    with torch.inference_mode():
        theirs = model(torch.tensor([tokens])).logits[0]
    parameters = dict(model.named_parameters())
    assert len(dense) == (14 if which == "mixed" else 21)
    for name, expected in dense.items():
        assert torch.equal(parameters[name].float(), expected), name
    for file in folder.glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    ours = torch.cat(list(Scorer(EngineConfig(model=str(tmp_path), backend="reference")).logits(tokens)))
    # compressed-tensors divides the range of int8 activations by 127.5, and this project by 127, the largest code.
    tolerance = {"w8a8": 0.05}.get(which, 1e-4) * theirs.std()
    assert (ours - theirs).square().mean().sqrt() < tolerance


# Settings.


def test_one_scheme_targets_every_linear_layer_and_names_the_dense_ones() -> None:
    schemes = {"a.q_proj": settled("fp8"), "a.k_proj": SCHEMES["bf16"], "b.q_proj": settled("fp8")}
    config = CompressedTensors.for_schemes(schemes).config()
    assert config["format"] == "float-quantized"
    assert config["ignore"] == ["lm_head", "a.k_proj"]
    assert [group["targets"] for group in config["config_groups"].values()] == [["Linear"]]


def test_several_schemes_are_told_apart_by_names() -> None:
    schemes = {"a": settled("w4a16"), "b": settled("fp8"), "c": settled("w4a16"), "d": settled("w4a16", 64)}
    written = CompressedTensors.for_schemes(schemes | {"e": SCHEMES["f16"]})
    config = written.config()
    assert config["format"] == "mixed-precision"
    assert config["ignore"] == ["lm_head", "e"]
    groups = {name: (group["targets"], group["format"]) for name, group in config["config_groups"].items()}
    assert groups == {
        "group_0": (["a", "c"], "pack-quantized"),
        "group_1": (["b"], "float-quantized"),
        "group_2": (["d"], "pack-quantized"),
    }
    assert find_format(config) == written
    assert written.layout("d").group_size == 64


@pytest.mark.parametrize(
    ("others", "head", "targets"),
    [
        (["w4a16", "w4a16"], "w8a16", [["Linear"], ["lm_head"]]),
        (["w8a16", "w8a16"], "w8a16", [["Linear", "lm_head"]]),
        (["w4a16", "w8a16"], "w8a16", [["0"], ["1", "lm_head"]]),
        (["fp8", "f16"], "w4a16", [["Linear"], ["lm_head"]]),
        (["f16", "f16"], "w8a16", [["lm_head"]]),
    ],
)
def test_a_quantized_head_is_named_and_the_peer_finds_it(others: list[str], head: str, targets: list) -> None:
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    schemes = {str(number): SCHEMES["f16"] if name == "f16" else settled(name) for number, name in enumerate(others)}
    schemes[HEAD] = settled(head)
    written = CompressedTensors.for_schemes(schemes)
    config = written.config()
    assert [group["targets"] for group in config["config_groups"].values()] == targets
    assert config["ignore"] == [module for module, scheme in schemes.items() if scheme.is_dense]
    assert find_format(config) == written
    original = random_weight(schemes[HEAD], 64, 64)
    tensors = written.encode(HEAD, original)
    assert written.holds(HEAD, tensors)
    assert torch.equal(written.decode(HEAD, tensors.__getitem__).dequantize(), original.dequantize())
    model = torch.nn.ModuleDict({name: torch.nn.Linear(64, 64) for name in schemes})
    apply_quantization_config(model, QuantizationConfig.model_validate(config))
    for name, module in model.items():
        found = getattr(module, "quantization_scheme", None)
        assert (found is None) == schemes[name].is_dense
        assert found is None or found.weights.num_bits == schemes[name].bits


def test_the_peer_gives_each_module_of_a_mixture_the_same_settings() -> None:
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    schemes = {"0": settled("w4a16"), "1": settled("mxfp4"), "2": SCHEMES["f16"], "3": settled("nvfp4")}
    written = CompressedTensors.for_schemes(schemes)
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in schemes))
    apply_quantization_config(model, QuantizationConfig.model_validate(written.config()))
    found = {name: getattr(module, "quantization_scheme", None) for name, module in model.named_children()}
    assert found["2"] is None
    for name in ("0", "1", "3"):
        assert found[name].format == written.layout(name).name
        assert found[name].weights.group_size == written.layout(name).group_size


def test_names_go_before_patterns_and_both_before_every_linear_layer() -> None:
    kinds = [PackedIntegers(4, "channel"), Integers(8, "channel"), Floats(8, "channel")]
    targets = [("Linear",), ("re:.*mlp.*",), ("a.mlp.down", "re:lm.*")]
    read = CompressedTensors(tuple(map(ModuleGroup, kinds, targets)), ("re:.*visual.*", "a.k"))
    assert find_format(read.config()) == read
    assert [read.layout(name) for name in ("a.q", "a.mlp.up", "a.mlp.down", "lm_head")] == [*kinds, kinds[2]]
    for name in ("a.visual.q", "a.k"):
        with pytest.raises(InputError, match="ignore"):
            read.layout(name)
    with pytest.raises(InputError, match="no group targets it"):
        CompressedTensors((ModuleGroup(kinds[0], ("re:b",)),)).decode("a", {}.__getitem__)


def test_an_older_checkpoint_with_a_group_index_is_read(weight, same) -> None:
    original = weight(4, 32, 8, 4, True, act_order=True)
    written = format_of("w4a16", 8)
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
    assert find_format(config) == CompressedTensors((ModuleGroup(PackedIntegers(4, "group", 128)),))


@pytest.mark.parametrize("name", HELD)
def test_presets_of_the_peer_are_read_as_they_are_written(name: str) -> None:
    """The peer's presets say the same as ours, in more fields."""
    from compressed_tensors.quantization import QuantizationConfig

    preset = {"w4a16": "W4A16", "w8a16": "W8A16", "w8a8": "W8A8", "fp8": "FP8_DYNAMIC", "nvfp4": "NVFP4A16"}
    theirs = QuantizationConfig(
        config_groups={preset.get(name, "MXFP4A16"): ["Linear"]}, format=format_of(name).config()["format"],
        quantization_status="compressed", ignore=["lm_head"],
    )  # fmt: skip
    assert find_format(json.loads(theirs.model_dump_json())) == format_of(name, 128)


def test_which_modules_it_holds() -> None:
    assert format_of("w8a8").holds("a.b", {"a.b.weight", "a.b.weight_scale"})
    assert not format_of("w8a8").holds("lm_head", {"lm_head.weight", "a.b.weight_scale"})


GROUP = ["config_groups", "group_0"]


@pytest.mark.parametrize(
    ("name", "path", "value", "message"),
    [
        ("w4a16", ["format"], "marlin-24", "marlin-24"),
        ("w4a16", ["quantization_status"], "frozen", "quantization_status"),
        ("w4a16", ["kv_cache_scheme"], {"num_bits": 8}, "kv_cache_scheme"),
        ("w4a16", ["sparsity_config"], {"format": "sparse-bitmask"}, "sparse-bitmask"),
        ("w4a16", ["transform_config"], {"config_groups": {"u": {}}}, "transform_config"),
        ("w4a16", ["config_groups"], {}, "0 config_groups"),
        ("w4a16", ["ignore"], ["re:(a+)+"], "could take very long"),
        ("w4a16", [*GROUP, "targets"], ["re:" + "a" * 501], "501 characters"),
        ("w4a16", [*GROUP, "targets"], "Linear", "targets"),
        ("w4a16", [*GROUP, "weights", "type"], "float", "weights.type"),
        ("w4a16", [*GROUP, "weights", "num_bits"], 3, "num_bits"),
        ("w4a16", [*GROUP, "weights", "group_size"], None, "group_size"),
        ("w4a16", [*GROUP, "weights", "strategy"], "block", "strategy"),
        ("w4a16", [*GROUP, "weights", "strategy"], "tensor", "strategy"),
        ("w4a16", [*GROUP, "format"], "nvfp4-pack-quantized", "nvfp4"),
        ("w4a16", [*GROUP, "input_activations"], {"num_bits": 8, "strategy": "tensor"}, "input_activations"),
        ("w8a8", [*GROUP, "weights", "symmetric"], False, "symmetric"),
        ("fp8", [*GROUP, "weights", "num_bits"], 4, "num_bits"),
        ("fp8", [*GROUP, "input_activations", "dynamic"], False, "dynamic"),
        ("nvfp4", [*GROUP, "weights", "group_size"], 32, "group_size"),
        ("mxfp4", [*GROUP, "weights", "strategy"], "tensor_group", "strategy"),
        ("mxfp4", [*GROUP, "input_activations"], {"num_bits": 4, "strategy": "group"}, "input_activations"),
    ],
)
def test_configs_that_cannot_be_read_are_refused_by_name(name: str, path: list[str], value, message: str) -> None:
    config = format_of(name).config()
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(InputError, match=message) as caught:
        find_format(config)
    assert "\n" not in str(caught.value)


def test_a_mixture_whose_groups_do_not_say_what_they_are_is_refused() -> None:
    config = format_of("w4a16").config() | {"format": "mixed-precision"}
    config["config_groups"]["group_0"]["format"] = None
    with pytest.raises(InputError, match="no format that says what it is"):
        find_format(config)


# Tensors that disagree.


@pytest.mark.parametrize(
    ("name", "tensor_name", "tensor"),
    [
        ("w4a16", "weight_packed", torch.zeros(4, 7, dtype=torch.int32)),
        ("w4a16", "weight_shape", torch.tensor([4, 1 << 60])),
        ("w4a16", "weight_shape", torch.tensor([4.0, 32.0])),
        ("w4a16", "weight_shape", torch.tensor([-4, -32])),
        ("w4a16", "weight_scale", torch.zeros(4, 3)),
        ("w4a16", "weight_scale", torch.zeros(4, 8)),
        ("w4a16", "weight_scale", torch.zeros(5, 4)),
        ("w4a16", "weight_scale", torch.full((4, 4), float("nan"))),
        ("w8a8", "weight", torch.zeros(4, 32)),
        ("w8a8", "weight_scale", torch.full((4, 1), float("inf"))),
        ("fp8", "weight", torch.zeros(4, 32, dtype=torch.uint8)),
        ("fp8", "weight", torch.full((4, 32), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)),
        ("fp8", "weight", torch.full((4, 32), 0xFF, dtype=torch.uint8).view(torch.float8_e4m3fn)),
        ("fp8", "weight_scale", torch.zeros(4)),
        ("fp8", "weight_scale", torch.full((4, 1), float("nan"))),
        ("nvfp4", "weight_packed", torch.zeros(4, 16)),
        ("nvfp4", "weight_packed", torch.zeros(4, 15, dtype=torch.uint8)),
        ("nvfp4", "weight_packed", torch.zeros(0, 16, dtype=torch.uint8)),
        ("nvfp4", "weight_scale", torch.zeros(4, 2)),
        ("nvfp4", "weight_scale", torch.zeros(4, 1).to(torch.float8_e4m3fn)),
        ("nvfp4", "weight_scale", torch.full((4, 2), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)),
        ("nvfp4", "weight_global_scale", torch.zeros(1)),
        ("nvfp4", "weight_global_scale", torch.full((1,), -1.0)),
        ("nvfp4", "weight_global_scale", torch.full((1,), 1e-45)),
        ("nvfp4", "weight_global_scale", torch.full((1,), float("nan"))),
        ("nvfp4", "weight_global_scale", torch.ones(2)),
        ("mxfp4", "weight_packed", torch.zeros(4, 24, dtype=torch.uint8)),
        ("mxfp4", "weight_scale", torch.full((4, 1), 0xFF, dtype=torch.uint8)),
        ("mxfp4", "weight_scale", torch.zeros(4, 1)),
        ("mxfp4", "weight_scale", torch.zeros(4, 2, dtype=torch.uint8)),
    ],
)
def test_damaged_modules_are_refused(name: str, tensor_name: str, tensor: torch.Tensor) -> None:
    written = format_of(name, 8)
    tensors = written.encode("m", random_weight(settled(name, 8), 4, 32))
    assert f"m.{tensor_name}" in tensors
    tensors[f"m.{tensor_name}"] = tensor
    with pytest.raises(InputError, match=r"m\.weight") as caught:
        written.decode("m", tensors.__getitem__)
    assert "\n" not in str(caught.value)


@given(seed=st.integers(0, 10_000), name=st.sampled_from(HELD))
def test_any_bytes_of_the_right_shape_are_read_or_refused(seed: int, name: str) -> None:
    """Whatever comes back has finite weights and the shape that was promised."""
    written = format_of(name, 8)
    generator = torch.Generator().manual_seed(seed)
    tensors = written.encode("m", random_weight(settled(name, 8), 4, 32))
    for key, tensor in tensors.items():
        if key != "m.weight_shape":
            noise = torch.randint(0, 256, (tensor.numel() * tensor.itemsize,), generator=generator, dtype=torch.uint8)
            tensors[key] = noise.view(tensor.dtype).view(tensor.shape)
    try:
        found = written.decode("m", tensors.__getitem__)
    except InputError as error:
        assert "m.weight" in str(error)
    else:
        assert found.shape == (4, 32)
        assert found.scales.float().isfinite().all() or name == "nvfp4"


def test_4_bit_codes_outside_their_range_are_refused() -> None:
    tensors = {"m.weight": torch.full((2, 4), 8, dtype=torch.int8), "m.weight_scale": torch.ones(2, 1)}
    with pytest.raises(InputError, match="4 bits"):
        Integers(4, "channel").decode("m", tensors.__getitem__)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("w4a16", {"scales": torch.full((4, 4), float("inf"))}, "float16"),
        ("w4a16", {"activations": "int8"}, "rounds activations"),
        ("w4a16", {"group_index": torch.zeros(32, dtype=torch.int32)}, "group index"),
        ("w4a16", {"zeros": torch.zeros(4, 4, dtype=torch.uint8)}, "asymmetric"),
        ("w4a16", {"minimums": torch.zeros(4, 4)}, "asymmetric"),
        ("w4a16", {"number": FP4}, "fp4"),
        ("w8a8", {"number": FP8}, "fp8"),
        ("fp8", {"activations": None}, "rounds activations"),
        ("fp8", {"scales": torch.ones(4, 2)}, "2 groups"),
        ("nvfp4", {"scales": torch.ones(4, 2)}, "float8_e4m3fn"),
        ("nvfp4", {"scales": TwoLevel(torch.ones(4, 2), torch.ones(1, 1))}, "float8_e4m3fn"),
        ("nvfp4", {"scales": TwoLevel(torch.ones(4, 2).to(torch.float8_e4m3fn), torch.zeros(1, 1))}, "no reciprocal"),
        ("nvfp4", {"scales": TwoLevel(torch.ones(4, 2).to(torch.float8_e4m3fn), torch.ones(4, 1))}, "one factor"),
        ("mxfp4", {"scales": torch.ones(4, 1)}, "float8_e8m0fnu"),
        ("mxfp4", {"scales": torch.tensor([[255]] * 4, dtype=torch.uint8).view(torch.float8_e8m0fnu)}, "finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused(name: str, change: dict, message: str) -> None:
    with pytest.raises(LlmoptError, match=message):
        format_of(name, 8).encode("m", replace(random_weight(settled(name, 8), 4, 32), **change))


def test_what_it_does_not_hold_is_refused() -> None:
    with pytest.raises(InputError, match="does not hold w4a16-asym; it holds w4a16"):
        format_of("w4a16-asym")
    with pytest.raises(InputError, match="desc-act"):
        CompressedTensors.for_schemes({"m": settled("w4a16")}, desc_act=True)


def test_every_layout_is_of_a_scheme_that_is_written() -> None:
    assert {format_of(name).layout("m").name for name in HELD} == set(LAYOUTS)
