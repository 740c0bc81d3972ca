"""`--head`: the output layer of a folder in codes, tied to the embedding before or not."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from llmopt.engine.config import EngineConfig
from llmopt.engine.llm import LLM
from llmopt.engine.params import SamplingParams
from llmopt.engine.scoring import Scorer
from llmopt.errors import InputError
from llmopt.model.source import EMBEDDING, HEAD, FolderSource, as_dense, open_source
from llmopt.quant import head as head_module
from llmopt.quant.head import round_head
from llmopt.quant.methods.rtn import round_to_nearest
from llmopt.quant.options import Options, make_options
from llmopt.quant.pipeline import quantize, run
from llmopt.quant.plan import make_plan
from llmopt.quant.recipe import resolve
from llmopt.quant.work import fingerprint
from llmopt.weights import quantized as quantized_module
from llmopt.weights.checkpoint import SafetensorsCheckpoint
from llmopt.weights.quantized import QuantizedTensor
from llmopt.weights.scheme import SCHEMES
from llmopt.weights.shards import ShardWriter

TIED, UNTIED = "llama-tied-biased", "qwen2"
TOKENS = list(range(3, 60))
RTN = {"method": "rtn", "scheme": "w4a16", "group_size": 32}
KINDS = {
    "gptq": RTN | {"format": "gptq", "head": "w8a16"},
    "gptq-asym": RTN | {"format": "gptq", "head": "w4a16-asym"},
    "gptq-w3": RTN | {"format": "gptq", "head": "w3a16"},
    "gptq-alike": RTN | {"format": "gptq", "head": "w4a16"},
    "compressed": RTN | {"format": "compressed-tensors", "head": "w8a16"},
    "compressed-alike": RTN | {"format": "compressed-tensors", "head": "w4a16"},
    "compressed-w8a8": {"method": "rtn", "scheme": "w8a8", "head": "w4a16"},
    "compressed-nvfp4": {"method": "rtn", "scheme": "nvfp4", "head": "w8a16"},
}


def logits(model: Path, backend: str = "reference") -> torch.Tensor:
    config = EngineConfig(model=str(model), backend=backend, dtype="float32")
    return torch.cat(list(Scorer(config).logits(TOKENS)))


def with_dense_head(artifact: Path, output: Path, head: torch.Tensor) -> Path:
    """A copy of an artifact whose head is this matrix in float32."""
    output.mkdir()
    checkpoint, shards = SafetensorsCheckpoint(artifact), ShardWriter(output)
    for name in checkpoint.names():
        if not name.startswith("lm_head."):
            shards.add(name, checkpoint.load(name))
    shards.add(HEAD, head)
    shards.close()
    for path in artifact.glob("*.json"):
        if not path.name.endswith("index.json"):
            (output / path.name).write_bytes(path.read_bytes())
    return output


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [TIED, UNTIED])
def test_the_head_comes_back_as_it_was_rounded(family: str, kind: str, tiny_model, tmp_path: Path) -> None:
    original, output = open_source(str(tiny_model(family)[0])), tmp_path / "out"
    result = quantize(str(original.path), str(output), **KINDS[kind])
    scheme = SCHEMES[KINDS[kind]["head"]].with_group_size(KINDS[kind].get("group_size", 64))
    expected = round_to_nearest(as_dense(original.head), scheme)
    source = open_source(str(output))
    assert isinstance(source, FolderSource) and not source.config.tie_word_embeddings
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is False
    found = source.head
    assert isinstance(found, QuantizedTensor) and found.activations is None
    assert (found.bits, found.group_size) == (scheme.bits, scheme.group_size)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.dequantize(), expected.dequantize())
    assert HEAD not in source.checkpoint.names()
    embedding = source.weight(EMBEDDING)
    assert isinstance(embedding, torch.Tensor)
    torch.testing.assert_close(embedding.float(), as_dense(original.embedding))
    report = result["modules"][-1]
    assert (report["name"], report["method"], report["scheme"]) == ("lm_head", "rtn", scheme.name)
    difference = expected.dequantize() - as_dense(original.head)
    error = difference.square().sum() / as_dense(original.head).square().sum()
    assert report["error"] == pytest.approx(float(error), rel=1e-4)
    assert len(result["modules"]) == 22 and result["recipe"]["head"] == scheme.name


@pytest.mark.parametrize("kind", ["gptq", "gptq-asym", "compressed"])
@pytest.mark.parametrize("family", [TIED, UNTIED])
def test_logits_are_those_of_the_dequantized_head(family: str, kind: str, tiny_model, tmp_path: Path) -> None:
    quantize(str(tiny_model(family)[0]), str(tmp_path / "out"), **KINDS[kind])
    head = open_source(str(tmp_path / "out")).head
    dense = with_dense_head(tmp_path / "out", tmp_path / "dense", head.dequantize())
    truth = logits(dense)
    torch.testing.assert_close(logits(tmp_path / "out"), truth, atol=0, rtol=0)
    torch.testing.assert_close(logits(tmp_path / "out", "cpu"), truth, atol=2e-3, rtol=1e-3)
    changed = logits(with_dense_head(tmp_path / "out", tmp_path / "other", head.dequantize() * 1.5))
    assert not torch.allclose(changed, truth, atol=1e-2)


@pytest.mark.parametrize("kind", ["gptq", "gptq-asym", "compressed"])
def test_the_serving_engine_runs_it_by_its_kernels(kind: str, tiny_model, tmp_path: Path, caplog) -> None:
    """By the decoder that is one call, and without a word of plain torch."""
    quantize(str(tiny_model(TIED)[0]), str(tmp_path / "out"), **KINDS[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm = LLM(str(tmp_path / "out"), backend="cpu", max_num_seqs=2)
        assert llm.engine.runner.fused is not None
        text = llm.generate("the cat", SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(text[0].outputs[0].token_ids) == 4
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == []


@pytest.mark.parametrize(("family", "kind"), [(TIED, "gptq"), (UNTIED, "compressed")])
def test_transformers_reads_the_embedding_apart_from_the_head(
    family: str, kind: str, tiny_model, tmp_path: Path
) -> None:
    from transformers import AutoConfig

    quantize(str(tiny_model(family)[0]), str(tmp_path / "out"), **KINDS[kind])
    assert AutoConfig.from_pretrained(tmp_path / "out").tie_word_embeddings is False


def test_transformers_gives_the_same_logits_of_compressed_tensors(tiny_model, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    import transformers

    quantize(str(tiny_model(TIED)[0]), str(tmp_path / "out"), **KINDS["compressed"])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.tensor([TOKENS])).logits[0].float()
    torch.testing.assert_close(theirs, logits(tmp_path / "out"), atol=0.05, rtol=0.02)


def test_a_calibrating_method_rounds_the_head_all_the_same(tiny_model, tmp_path: Path) -> None:
    calibrated = {"method": "gptq", "calibration": "builtin", "samples": 4, "seq_len": 64}
    heads = []
    for name, options in (("gptq", KINDS["gptq"] | calibrated), ("rtn", KINDS["gptq"])):
        quantize(str(tiny_model(TIED)[0]), str(tmp_path / name), **options)
        heads.append(open_source(str(tmp_path / name)).head)
    assert torch.equal(heads[0].codes, heads[1].codes)


def test_group_order_and_a_budget_of_bits_go_with_it(tiny_model, tmp_path: Path) -> None:
    calibrated = {"method": "gptq", "calibration": "builtin", "samples": 4, "seq_len": 64, "head": "w8a16"}
    options = calibrated | {"group_size": 32, "format": "gptq"}
    for name, more in (("order", {"desc_act": True}), ("budget", {"target_bpw": 5.5})):
        quantize(str(tiny_model(TIED)[0]), str(tmp_path / name), **options | more)
        source = open_source(str(tmp_path / name))
        expected = round_to_nearest(as_dense(source.embedding), SCHEMES["w8a16"].with_group_size(32))
        assert torch.equal(source.head.codes, expected.codes)


def test_codes_may_be_rounded_again_to_others(tiny_model, tmp_path: Path) -> None:
    """A GGUF file's embedding, which is in codes, serves as the tied head; and a head in codes as a plain one."""
    quantize(str(tiny_model(TIED)[0]), str(tmp_path / "a.gguf"), method="rtn", scheme="q8_0")
    quantize(str(tmp_path / "a.gguf"), str(tmp_path / "b"), **KINDS["gptq"])
    head = open_source(str(tmp_path / "a.gguf")).embedding.dequantize()
    expected = round_to_nearest(head, SCHEMES["w8a16"].with_group_size(32))
    assert torch.equal(open_source(str(tmp_path / "b")).head.codes, expected.codes)
    quantize(str(tmp_path / "b"), str(tmp_path / "c"), **RTN)
    again = open_source(str(tmp_path / "c"))
    assert isinstance(again.head, torch.Tensor) and not again.config.tie_word_embeddings


@pytest.mark.parametrize("kind", ["gptq", "compressed"])
def test_the_same_command_gives_the_same_bytes(kind: str, tiny_model, tmp_path: Path) -> None:
    written = []
    for name in "ab":
        quantize(str(tiny_model(TIED)[0]), str(tmp_path / name), **KINDS[kind])
        written.append({p.name: p.read_bytes() for p in (tmp_path / name).iterdir() if p.name != "llmopt.json"})
    assert written[0] == written[1]


@pytest.mark.parametrize("name", ["w8a16", "w4a16-asym"])
def test_rows_are_rounded_in_parts_that_change_nothing(name: str, monkeypatch) -> None:
    weight, scheme = torch.randn(50, 64), SCHEMES[name].with_group_size(32)
    whole, report = round_head(weight, scheme)
    sizes = []

    def remember(weight, scheme):
        for part, rounded in parts(weight, scheme):
            sizes.append(len(part))
            yield part, rounded

    parts = head_module.round_in_parts
    monkeypatch.setattr(head_module, "round_in_parts", remember)
    monkeypatch.setattr(quantized_module, "ELEMENTS_AT_ONCE", 7 * 64)
    again, its_report = round_head(weight, scheme)
    assert sizes == [7] * 7 + [1]
    assert torch.equal(again.codes, whole.codes) and torch.equal(again.scales, whole.scales)
    assert (again.zeros is None) == (whole.zeros is None) == scheme.symmetric
    assert its_report.error == pytest.approx(report.error, rel=1e-5)


def options(folder: Path, output: Path, **given) -> Options:
    export = {"output": str(output), "format": given.pop("format", None)}
    return make_options({"model": str(folder), "exports": [export], **given})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [TIED, UNTIED])
def test_the_plan_counts_it(family: str, kind: str, tiny_model, tmp_path: Path) -> None:
    asked = options(tiny_model(family)[0], tmp_path / "out", **KINDS[kind])
    plan, without = make_plan(asked), make_plan(asked.model_copy(update={"head": None}))
    (manifest,) = run(asked)
    assert plan.exports[0].size_bytes == manifest["size_bytes"]
    assert sum(plan.schemes.values()) == len(manifest["modules"]) == 1 + sum(without.schemes.values())
    grows = plan.exports[0].size_bytes > without.exports[0].size_bytes
    assert grows == (family == TIED)  # where it is tied, it comes beside the embedding
    assert (plan.disks[0].needed > without.disks[0].needed) == grows
    assert plan.parameters == without.parameters
    # Of a model this small, the embedding's or the head's moment is the one of most memory.
    assert "some of its rows in float32" in plan.memory and "some of its rows in float32" not in without.memory
    assert {phase for phase, seconds in manifest["phases"].items() if seconds > 0.01} <= plan.seconds.keys()


def test_an_interrupted_run_is_told_apart_by_its_head(tiny_model, tmp_path: Path) -> None:
    source = open_source(str(tiny_model(TIED)[0]))
    asked = [options(source.path, tmp_path / "out", **RTN | {"head": head}) for head in (None, "w8a16", "w4a16")]
    kept = [fingerprint(resolve(each, source.config), source) for each in asked]
    assert kept[0]["head"] is None and [each["head"] for each in kept[1:]] == ["w8a16", "w4a16"]
    assert len({each["the choice of schemes"] for each in kept}) == 3


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"scheme": "w4a16-asym", "format": "awq", "head": "w4a16-asym"},
            "awq keeps the head in 16 bits: give --head with --format gptq or compressed-tensors",
        ),
        ({"scheme": "q4_0", "group_size": None, "format": "gguf", "head": "w8a16"}, "in a GGUF file its types decide"),
        ({"format": "gptq", "head": "w8a6"}, r"unknown scheme 'w8a6' of a head in gptq \(did you mean w8a16\?\)"),
        ({"format": "gptq", "head": "w8a8"}, r"'w8a8' is no scheme of a head in gptq .*there are w2a16, .*w8a16"),
        (
            {"format": "compressed-tensors", "head": "fp8"},
            "'fp8' is no scheme of a head in .*; there are w4a16, w8a16$",
        ),
        ({"format": "compressed-tensors", "head": "w8a16-asym"}, r"did you mean w8a16\?\); there are w4a16, w8a16$"),
        ({"format": "gptq", "head": "q8_0"}, "'q8_0' is no scheme of a head in gptq"),
        ({"format": "gptq", "head": "f16"}, "'f16' is no scheme of a head in gptq"),
        ({"scheme": "w8a8", "group_size": 32, "head": "w8a16"}, "fixed group size"),
    ],
)
@pytest.mark.parametrize("door", [make_plan, run])
def test_what_cannot_be_is_refused(door, given: dict, says: str, tiny_model, tmp_path: Path) -> None:
    name = "out.gguf" if given.get("format") == "gguf" else "out"
    with pytest.raises(InputError, match=says) as error:
        door(options(tiny_model("llama")[0], tmp_path / name, **RTN | given))
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_one_gguf_among_several_exports_is_refused(tiny_model, tmp_path: Path) -> None:
    exports = [{"output": str(tmp_path / "a"), "format": "compressed-tensors"}, {"output": str(tmp_path / "a.gguf")}]
    given = {"model": str(tiny_model("llama")[0]), "exports": exports, "method": "rtn", "scheme": "mxfp4"}
    with pytest.raises(InputError, match="in a GGUF file its types decide"):
        run(make_options({**given, "head": "w8a16"}))


def test_the_original_packages_leave_the_head(tiny_model, tmp_path: Path, monkeypatch) -> None:
    from llmopt.quant.legacy.run import check_quantizer

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    source = open_source(str(tiny_model("llama")[0]))
    asked = {"method": "gptq", "scheme": "w4a16", "group_size": 32, "format": "gptq", "quantizer": "auto-gptq"}
    asked |= {"calibration": "builtin", "seq_len": 64}
    check_quantizer(resolve(options(source.path, tmp_path / "out", **asked), source.config), source.config)
    recipe = resolve(options(source.path, tmp_path / "out", **asked, head="w8a16"), source.config)
    with pytest.raises(InputError, match="overrides or --head"):
        check_quantizer(recipe, source.config)
