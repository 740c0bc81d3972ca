"""Bad input to the commands: one clear line, the right exit status, and nothing left behind."""

import json
import shutil
from pathlib import Path

import pytest

from llmopt.cli.main import main


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*words) runs the command line in this process; gives the exit status and what went to standard error."""

    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["llmopt", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().err

    return call


@pytest.fixture
def broken(tiny_model, tmp_path: Path):
    """A copy of a small checkpoint, to be broken."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama")[0], folder)
    return folder


def truncate(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


def one_line(status: int, error: str, expected: int = 2) -> str:
    assert status == expected, error
    assert error.startswith("llmopt: error: ") and error.count("\n") == 1, error
    return error


COMMANDS = {
    "quantize": lambda model, tmp: ["quantize", model, "--method", "rtn", "--output", str(tmp / "out")],
    "eval": lambda model, tmp: ["eval", model, "--ctx", "32", "--windows", "2"],
    "bench": lambda model, tmp: ["bench", model, "-p", "8", "-n", "4"],
    "serve": lambda model, tmp: ["serve", model, "--port", "0"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_that_is_not_there(command: str, run, tmp_path: Path) -> None:
    error = one_line(*run(*COMMANDS[command](str(tmp_path / "nowhere"), tmp_path)))
    assert "nowhere" in error and "smollm2" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["quantize", "eval", "bench"])
@pytest.mark.parametrize("share", [0.9, 0.01, 0.0])
def test_a_truncated_safetensors_file(command: str, share: float, run, broken: Path, tmp_path: Path) -> None:
    truncate(broken / "model.safetensors", share)
    error = one_line(*run(*COMMANDS[command](str(broken), tmp_path)))
    assert "model.safetensors" in error
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("share", [0.9, 0.3, 0.0])
def test_a_truncated_gguf_file(share: float, run, tiny_model, tmp_path: Path) -> None:
    file = tmp_path / "small.gguf"
    assert (
        run("quantize", str(tiny_model("llama")[0]), *["--method", "rtn", "--scheme", "q8_0", "-o"], str(file))[0] == 0
    )
    truncate(file, share)
    error = one_line(*run("bench", str(file), "-p", "8", "-n", "4"))
    assert "small.gguf" in error and "GGUF" in error


def test_a_pickled_checkpoint(run, broken: Path, tmp_path: Path) -> None:
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    assert "pickled" in one_line(*run(*COMMANDS["quantize"](str(broken), tmp_path)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM.*LlamaForCausalLM"),
        ({"architectures": None}, "LlamaForCausalLM"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "wide"}, "whole number"),
        ({"intermediate_size": 97}, r"\[96, 64\].*\[97, 64\]"),
        ({"num_key_value_heads": 3}, "share 3"),
        ({"hidden_act": "relu"}, "relu"),
        ({"num_attention_heads": 0, "num_key_value_heads": 1}, "num_heads"),
        ({"rope_parameters": None, "rope_scaling": "linear"}, "rope scaling must be an object"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn.*llama3"),
        ({"quantization_config": {"quant_method": "magic"}}, "magic.*gptq"),
    ],
)
def test_a_config_that_makes_no_sense(changes: dict, says: str, run, broken: Path, tmp_path: Path) -> None:
    import re

    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | changes))
    assert re.search(says, one_line(*run(*COMMANDS["bench"](str(broken), tmp_path))))


def test_a_config_that_is_no_json(run, broken: Path, tmp_path: Path) -> None:
    (broken / "config.json").write_text("{")
    assert "config.json" in one_line(*run(*COMMANDS["eval"](str(broken), tmp_path)))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--scheme", "w5a16"], "w4a16"),
        (["--method", "gtpq"], "gptq"),
        (["--group-size", "48"], "does not divide"),
        (["--scheme", "q8_0"], ".gguf"),
        (["--samples", "8"], "--samples only goes with --calibration or methods that calibrate"),
        (["--desc-act"], "--desc-act only goes with --method gptq"),
        (["--method", "gptq", "--seq-len", "64", "--samples", "0"], "at least 1"),
        (["--method", "gptq"], "--seq-len must be between 8 and the model's 256"),
    ],
)
def test_wrong_options_of_quantize(words: list[str], says: str, run, tiny_model, tmp_path: Path) -> None:
    error = one_line(*run(*COMMANDS["quantize"](str(tiny_model("llama")[0]), tmp_path), *words))
    assert says in error
    assert list(tmp_path.iterdir()) == []


def test_a_model_too_short_for_the_case(run, tiny_model) -> None:
    assert "256" in one_line(*run("bench", str(tiny_model("llama")[0]), "-p", "250", "-n", "20"))


def test_a_json_file_that_cannot_be_written(run, tiny_model, tmp_path: Path) -> None:
    words = COMMANDS["quantize"](str(tiny_model("llama")[0]), tmp_path)
    assert "/nowhere/" in one_line(*run(*words, "--json", "/nowhere/result.json"))


def test_unknown_option_and_subcommand_are_usage_errors(run) -> None:
    assert run("quantize", "smollm2", "--colour", "red")[0] == 2
    assert run("fly")[0] == 2


def test_help_and_version_need_no_torch(run) -> None:
    import subprocess
    import sys

    code = (
        "import sys\nfrom llmopt.cli.main import main\nsys.argv = ['llmopt', 'quantize', '--help']\n"
        "try: main()\nexcept SystemExit: pass\nprint('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.endswith("False False\n")
    assert "Example" in done.stdout
    assert run("--version")[0] == 0
