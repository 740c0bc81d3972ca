"""What a user may hand over, by accident or on purpose: one clear line, the right exit status, nothing left behind."""

import errno
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llmopt.cli.main import main
from llmopt.errors import InputError, LlmoptError
from llmopt.quant.pipeline import quantize

RTN = {"method": "rtn", "scheme": "w4a16", "group_size": 32}
GPTQ = {"method": "gptq", "scheme": "w4a16", "group_size": 32, "calibration": "builtin", "samples": 2, "seq_len": 32}
HEADER = 6000  # bytes from which on there is little but weights, where any bit is as good as another


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same small model in every form that is read."""
    place = tmp_path_factory.mktemp("models")
    made = {"plain": tiny_model("qwen2")[0]}
    for name, options in {
        "q4_0.gguf": {"method": "rtn", "scheme": "q4_0"},
        "f16.gguf": {"method": "rtn", "scheme": "f16"},
        "gptq": RTN | {"format": "gptq"},
        "compressed": RTN,
    }.items():
        quantize(str(made["plain"]), str(place / name), **options)
        made[name] = place / name
    return made


@pytest.fixture
def model(models, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(models["plain"], tmp_path / "model"))


@pytest.fixture
def llmopt(monkeypatch, capsys):
    """llmopt(*arguments) runs `llmopt quantize` and gives its exit status and what it said on standard error."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["llmopt", "quantize", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().err

    return run


def refused(output: Path, says: str, status: int, **call) -> None:
    """Quantizing is refused in one line, and nothing is there afterwards that was not there before."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(LlmoptError, match=says) as caught:
        quantize(output=str(output), **call)
    assert caught.value.exit_status == status
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    assert sorted(output.parent.iterdir()) == before


def rewrite_header(path: Path, change) -> None:
    """Change a safetensors file's header and leave its data alone."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[end:])


def swap_two_dimensions(header: dict) -> None:
    header["model.layers.1.mlp.up_proj.weight"]["shape"].reverse()


def lose_a_tensor(header: dict) -> None:
    header["model.layers.1.mlp.up_proj.extra"] = header.pop("model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (swap_two_dimensions, r"up_proj\.weight is \[64, 96\], but its config says \[96, 64\]"),
        (lose_a_tensor, r"holds no tensor model\.layers\.1\.mlp\.up_proj\.weight"),
    ],
)
@pytest.mark.parametrize("options", [RTN, GPTQ], ids=["rtn", "gptq"])
def test_a_checkpoint_that_is_not_what_its_config_says(model: Path, tmp_path: Path, change, says: str, options) -> None:
    rewrite_header(model / "model.safetensors", change)
    with pytest.raises(InputError, match=says):
        quantize(str(model), str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("length", [0, 7, 8, 100, 5000, -1])
@pytest.mark.parametrize("kind", ["plain", "gptq", "f16.gguf"])
def test_a_file_that_is_cut_short(models, tmp_path: Path, kind: str, length: int) -> None:
    copy = tmp_path / kind
    (shutil.copy if models[kind].is_file() else shutil.copytree)(models[kind], copy)
    file = copy if copy.is_file() else copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    refused(tmp_path / "out", "is not a whole (safetensors|GGUF) file", 2, model=str(copy), **RTN)


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 1 << 40, 200_000_000])
def test_an_absurd_header_length(model: Path, tmp_path: Path, length: int) -> None:
    file = model / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    refused(tmp_path / "out", f"{length} would be the header", 2, model=str(model), **RTN)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.k_proj.bias",
        "model.layers.0.mlp.down_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_a_weight_that_is_not_finite(model: Path, tmp_path: Path, name: str, value: float) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    for scheme in ("w8a16", "mxfp4", "nvfp4", "w8a8"):
        refused(
            tmp_path / "out", f"{name} of the model .* not finite", 2, model=str(model), method="rtn", scheme=scheme
        )
    refused(tmp_path / "out.gguf", f"{name} of the model", 2, model=str(model), method="rtn", scheme="q4_0")


def test_a_weight_that_is_not_finite_in_a_late_layer_costs_no_finished_one(model: Path, tmp_path: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="not finite"):
        quantize(str(model), str(tmp_path / "out"), **GPTQ)
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / ".out.work").glob("layer-*"))) == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"the cat sat", "has 3 tokens, too few|tokens, too few for 2 samples of 32"),
        (b"", "too few for 2 samples"),
        (b"\xff\xfe\x00\x01" * 100, "UTF-8|text"),
        (b"\0" * 10, "holds zero bytes"),
    ],
)
def test_a_calibration_file_with_little_in_it(models, tmp_path: Path, text: bytes, says: str, llmopt) -> None:
    (tmp_path / "text.txt").write_bytes(text)
    call = GPTQ | {"calibration": str(tmp_path / "text.txt")}
    refused(tmp_path / "out", says, 2, model=str(models["plain"]), **call)
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in call.items()]
    status, said = llmopt(models["plain"], "--output", tmp_path / "out", *flags)
    assert status == 2
    assert said.startswith("llmopt: error: ")
    assert said.count("\n") == 1


def test_an_output_that_cannot_be_written(models, tmp_path: Path, llmopt) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    for output, says in {
        "file": "is a file",
        "full": "exists and is not empty",
        "file/out": "cannot write to",
        "x" * 300: "too long",
    }.items():
        status, said = llmopt(models["plain"], "--output", tmp_path / output, "--method=rtn", "--group-size=32")
        assert status == 2
        assert says in said
        assert said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "thesis.txt"]


@pytest.mark.parametrize("options", [RTN, GPTQ, {"method": "rtn", "scheme": "q4_0"}], ids=["rtn", "gptq", "gguf"])
def test_a_full_disk(models, tmp_path: Path, options: dict) -> None:
    """A limit on the size of files stands for it, in a process of its own, and is met at the weights, at a layer that
    is kept, or at the tokenizer. The system's number of the error is another one; see also test_artifact.py."""
    output = tmp_path / ("out.gguf" if options["scheme"] == "q4_0" else "out")
    script = (
        "import resource, signal, sys, json\n"
        "from llmopt.cli import main\n"
        "from llmopt.quant import pipeline\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "try:\n"
        "    pipeline.quantize(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))\n"
        "except pipeline.LlmoptError as error:\n"
        "    main._fail(str(error), error.exit_status)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, str(models["plain"]), str(output), json.dumps(options)],
        capture_output=True, text=True, env=os.environ, timeout=100, check=False,
    )  # fmt: skip
    assert ended.returncode == 3, ended.stderr
    assert ended.stderr.startswith("llmopt: error: writing")
    assert os.strerror(errno.EFBIG) in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


flips = st.lists(
    st.one_of(
        st.tuples(st.integers(0, HEADER), st.integers(0, 255)),
        st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("plain", "model.safetensors"),
        ("plain", "config.json"),
        ("plain", "tokenizer.json"),
        ("gptq", "model.safetensors"),
        ("compressed", "model.safetensors"),
        ("compressed", "config.json"),
        ("q4_0.gguf", ""),
    ],
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=flips)
@example(flips=[(6000, 0)])
def test_flipped_bytes_end_well_or_in_one_line(models, tmp_path: Path, kind: str, file: str, flips: list) -> None:
    place = tmp_path / "fuzzed"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    copy = place / kind
    (shutil.copy if models[kind].is_file() else shutil.copytree)(models[kind], copy)
    broken = copy / file if file else copy
    content = bytearray(broken.read_bytes())
    for at, value in flips:
        content[at % len(content)] = value
    broken.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        quantize(str(copy), str(place / "out"), **RTN)
        assert (place / "out" / "llmopt.json").exists()
    except LlmoptError as error:
        assert "\n" not in str(error)
        assert [path.name for path in place.iterdir()] == [kind]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000, "half a gigabyte for a tiny model"


def test_what_does_not_fit_float16_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0] = torch.finfo(torch.float32).max
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path / "out", r"layers\.1\.mlp\.up_proj\.weight came out", 3, model=str(model), **RTN)
