"""The original packages as quantizers: refused at once without CUDA, in an environment of their own, all or nothing.

A worker that only copies an artifact stands in for the packages, which need CUDA. Where their environment has been made
on this machine, the real worker runs too, on the CPU, with what asks for CUDA answered from outside it.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import pytest
import torch

from llmopt.errors import InputError, LlmoptError
from llmopt.model.source import EMBEDDING, as_dense, open_source
from llmopt.quant.legacy import environment, run
from llmopt.quant.legacy.environment import environment_folder, environment_python
from llmopt.quant.options import make_options
from llmopt.quant.phases import Phases
from llmopt.quant.pipeline import quantize
from llmopt.quant.recipe import Recipe, resolve
from llmopt.weights.quantized import QuantizedTensor

TOKENS = torch.arange(3, 67).repeat(4, 1)
SETTINGS = {
    "auto-gptq": {"method": "gptq", "scheme": "w4a16", "group_size": 32},
    "autoawq": {"method": "awq", "scheme": "w4a16-asym", "group_size": 32},
}


def recipe_for(quantizer: str, model: Path, output: Path, **others) -> Recipe:
    exports = [{"output": str(output)}]
    options = {"model": str(model), "exports": exports, "quantizer": quantizer, "samples": 4, "seq_len": 64}
    options |= SETTINGS[quantizer] | others
    return resolve(make_options(options), open_source(str(model)).config)


@pytest.fixture
def cuda(monkeypatch) -> None:
    """Let it seem that there is a CUDA device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture(autouse=True)
def logs_go_with_the_tests(tmp_path_factory: pytest.TempPathFactory, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("logs")))


# --- Refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantizer", run.PACKAGES)
def test_without_cuda_nothing_is_begun(quantizer: str, tiny_model, tmp_path: Path, monkeypatch) -> None:
    folder, _ = tiny_model("llama")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(run, "environment_python", lambda *_, **__: pytest.fail("an environment was made"))
    recipe = recipe_for(quantizer, folder, tmp_path / "out")
    method = SETTINGS[quantizer]["method"]
    with pytest.raises(LlmoptError, match=f"{quantizer} quantizes on CUDA only.*native --method {method}"):
        run.check_quantizer(recipe, open_source(str(folder)).config)
    with pytest.raises(LlmoptError, match="CUDA only"):
        run.quantize_with_package(recipe, open_source(str(folder)), TOKENS, Phases(), started=time.monotonic())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("quantizer", "family", "others", "says"),
    [
        ("auto-gptq", "llama", {"device": "cpu"}, "leave out --device cpu"),
        ("auto-gptq", "llama", {"method": "rtn"}, "auto-gptq is --method gptq"),
        ("autoawq", "llama", {"method": "gptq"}, "autoawq is --method awq"),
        ("auto-gptq", "llama", {"ignore": ["down_proj"]}, "without --ignore"),
        ("auto-gptq", "llama", {"overrides": [{"modules": "mlp", "scheme": "w8a16"}]}, "by one scheme"),
        ("auto-gptq", "qwen3", {}, "does not know qwen3, only llama, mistral, qwen2"),
        ("autoawq", "llama", {"group_size": -1}, "group-size above 0"),
        ("autoawq", "llama", {}, "multiples of 64, .* has (32|96)"),
    ],
)
def test_what_a_package_cannot_do_is_refused(
    quantizer: str, family: str, others: dict, says: str, cuda, tiny_model, tmp_path: Path
) -> None:
    folder, _ = tiny_model(family)
    recipe = recipe_for(quantizer, folder, tmp_path / "out", **others)
    with pytest.raises(InputError, match=says):
        run.check_quantizer(recipe, open_source(str(folder)).config)


def test_the_native_quantizer_is_never_refused(tiny_model, tmp_path: Path) -> None:
    folder, _ = tiny_model("qwen3")
    exports = [{"output": str(tmp_path / "out")}]
    options = {"model": str(folder), "exports": exports, "ignore": ["down_proj"], "method": "rtn"}
    config = open_source(str(folder)).config
    run.check_quantizer(resolve(make_options(options), config), config)


# --- The environment ----------------------------------------------------------------------------------------------

MAKE = """
import os, signal, sys
from pathlib import Path
from llmopt.quant.legacy.environment import environment_python

def tell(phase, done, total):
    print(phase, flush=True)
    if sys.argv[2] == "die" and "making" in phase:
        os.kill(os.getpid(), signal.SIGKILL)

print(environment_python("small", Path(sys.argv[1]), tell))
"""


@pytest.fixture
def requirements(tmp_path: Path, monkeypatch) -> Path:
    """Requirements that need no network: one wheel, made here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    wheel = tmp_path / "small_thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("small_thing.py", "ANSWER = 42\n")
        about = "small_thing-1.0.dist-info"
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: small-thing\nVersion: 1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    file = tmp_path / "requirements.txt"
    file.write_text(f"# one line of comment\n{wheel}\n")
    return file


def start_making(requirements: Path, end: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", MAKE, requirements, end], stdout=subprocess.PIPE, text=True)


def answer(python: Path) -> str:
    return subprocess.check_output([python, "-I", "-c", "import small_thing; print(small_thing.ANSWER)"], text=True)


def test_an_environment_is_made_once_even_after_a_crash_and_by_two_at_once(requirements: Path, monkeypatch) -> None:
    killed = start_making(requirements, "die")
    killed.communicate()
    folder = environment_folder("small", requirements)
    assert killed.returncode == -signal.SIGKILL
    assert folder.exists() and not (folder / "ready").exists()
    (folder / "left_over").touch()

    makers = [start_making(requirements, "live") for _ in range(2)]
    said = [maker.communicate()[0].splitlines() for maker in makers]
    assert [maker.returncode for maker in makers] == [0, 0]
    assert [lines[-1] for lines in said] == [str(folder / "bin" / "python")] * 2
    assert sorted(any("making" in line for line in lines) for lines in said) == [False, True]
    assert not (folder / "left_over").exists()

    steps: list[str] = []
    python = environment_python("small", requirements, lambda *step: steps.append(step))
    assert steps == []  # it is there
    assert answer(python) == "42\n"

    made: list[Path] = []
    monkeypatch.setattr(environment, "_make", lambda folder, *_: made.append(folder))
    python.unlink()
    python.symlink_to("/nowhere/python3")  # as when the Python that it was made from is removed
    environment_python("small", requirements)
    assert made == [folder]


def test_pips_failure_is_one_line_with_the_place_of_its_log(requirements: Path) -> None:
    requirements.write_text("/nowhere/there_is_no_such-1.0-py3-none-any.whl\n")
    with pytest.raises(LlmoptError, match=r"environment of small could not be made: .*ERROR.*log: ") as caught:
        environment_python("small", requirements)
    assert "\n" not in str(caught.value)
    log = Path(str(caught.value).split("log: ")[1].rstrip(")"))
    assert "/nowhere/there_is_no_such" in log.read_text()
    assert not (environment_folder("small", requirements) / "ready").exists()


def test_other_requirements_make_another_environment(requirements: Path) -> None:
    first = environment_folder("small", requirements)
    requirements.write_text("# nothing\n")
    assert environment_folder("small", requirements) != first


def test_a_cache_that_cannot_be_written_is_one_line(requirements: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(LlmoptError, match=r"cannot make the environment .*: Not a directory"):
        environment_python("small", requirements)


# --- The worker ---------------------------------------------------------------------------------------------------


def write_worker(path: Path, body: str) -> Path:
    path.write_text("import json, os, pathlib, shutil, sys\njob = json.load(open(sys.argv[1]))\n" + body)
    return path


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("""print(json.dumps({"error": "OSError: no luck"})); sys.exit(1)""", r"auto-gptq failed: OSError: no luck \("),
        ("os.kill(os.getpid(), 9)", "ended with status -9 and gave no reason"),
        ("""print('{"resu', flush=True); os.kill(os.getpid(), 9)""", "ended with status -9"),
        ("", "ended with status 0 and gave no reason"),
        ("raise ValueError('kaputt')", "ended with status 1"),
    ],
)
def test_a_worker_that_fails_is_one_line_and_leaves_its_log(body: str, says: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(run, "WORKER", write_worker(tmp_path / "worker.py", body))
    (tmp_path / "job.json").write_text("{}")
    with pytest.raises(LlmoptError, match=says) as caught:
        run.run_worker(Path(sys.executable), tmp_path / "job.json", "auto-gptq")
    assert "\n" not in str(caught.value)
    log = Path(str(caught.value).split("log: ")[1].rstrip(")"))
    assert ("kaputt" in log.read_text()) == ("kaputt" in body)


def test_a_worker_does_not_outlive_an_interruption(tmp_path: Path, monkeypatch) -> None:
    body = """print(json.dumps({"progress": [os.getpid(), 0]}), flush=True)\nimport time; time.sleep(600)"""
    monkeypatch.setattr(run, "WORKER", write_worker(tmp_path / "worker.py", body))
    (tmp_path / "job.json").write_text("{}")
    seen: list[int] = []

    def interrupt(phase: str, done: int, total: int) -> None:
        if phase.startswith("quantizing"):
            seen.append(done)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run_worker(Path(sys.executable), tmp_path / "job.json", "auto-gptq", interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(seen[0], 0)


COPY = """
shutil.copytree(job["source"], {seen!r})
shutil.copytree({made!r}, job["output"])
(pathlib.Path(job["output"]) / "model.safetensors").chmod(0o600)
names = [f"model.layers.{{i}}.{{m}}" for i in range(3) for m in ("mlp.up_proj", "self_attn.q_proj")]
print(json.dumps({{"progress": [1, 2]}}))
print(json.dumps({{"result": {{"modules": [{{"name": n, "error": 0.25, "note": None}} for n in names], "seconds": 1.5,
    "peak_rss_bytes": 1 << 50, "versions": {{"auto-gptq": "0.7.1"}}, "job": job}}}}))
"""


def copying_worker(monkeypatch, tmp_path: Path, made: Path) -> None:
    """Let a worker that copies a folder into its output run in place of the real one, under this Python."""
    body = COPY.format(seen=str(tmp_path / "seen"), made=str(made))
    monkeypatch.setattr(run, "WORKER", write_worker(tmp_path / "worker.py", body))
    monkeypatch.setattr(run, "environment_python", lambda *_, **__: Path(sys.executable))


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_an_artifact_is_assembled_whole(kind: str, cuda, tiny_model, tmp_path: Path, monkeypatch) -> None:
    model, _ = tiny_model("llama3-rope")
    if kind == "gguf":
        quantize(str(model), str(tmp_path / "model.gguf"), method="rtn", scheme="q8_0")
        model = tmp_path / "model.gguf"
    made = tmp_path / "made"
    quantize(str(model), str(made), method="rtn", scheme="w4a16", format="gptq", group_size=32)
    copying_worker(monkeypatch, tmp_path, made)
    source = open_source(str(model))
    recipe = recipe_for("auto-gptq", model, tmp_path / "out", seed=7)
    steps: list[tuple] = []
    manifest = run.quantize_with_package(
        recipe, source, TOKENS, Phases(), started=time.monotonic(), progress=lambda *step: steps.append(step)
    )

    output = tmp_path / "out"
    assert json.loads((output / "llmopt.json").read_text()) == json.loads(json.dumps(manifest))
    assert manifest["quantizer"] == {"name": "auto-gptq", "seconds": 1.5, "versions": {"auto-gptq": "0.7.1"}}
    assert manifest["recipe"]["quantizer"] == "auto-gptq"
    assert manifest["peak_rss_bytes"] == 1 << 50
    assert [module["error"] for module in manifest["modules"]] == [0.25] * 6
    assert manifest["size_bytes"] == pytest.approx((output / "model.safetensors").stat().st_size, rel=0.2)
    assert ("quantizing by auto-gptq", 1, 2) in steps
    names = {path.name for path in output.iterdir()}
    assert {"config.json", "quantize_config.json", "tokenizer.json", "model.safetensors"} < names
    assert "work" not in names
    assert (output / "model.safetensors").stat().st_mode & 0o777 == 0o644

    found, meant, seen = open_source(str(output)), open_source(str(made)), open_source(str(tmp_path / "seen"))
    assert found.tokenizer.encode("the cat") == source.tokenizer.encode("the cat")
    for name, weight in meant.layer(1).items():
        torch.testing.assert_close(as_dense(found.layer(1)[name]), as_dense(weight), atol=0, rtol=0)
        torch.testing.assert_close(seen.layer(1)[name], as_dense(source.layer(1)[name], torch.float16))
    assert seen.weight(EMBEDDING).dtype == torch.float16
    assert seen.config.rope == source.config.rope
    assert json.loads((tmp_path / "seen" / "config.json").read_text())["torch_dtype"] == "float16"


def test_the_job_says_all_that_the_package_needs(cuda, tiny_model, tmp_path: Path) -> None:
    model, _ = tiny_model("llama")
    recipe = recipe_for("auto-gptq", model, tmp_path / "out", scheme="w8a16", desc_act=True, damp=0.05, seed=3)
    job = run._job(recipe, TOKENS, tmp_path)
    assert job.pop("tokens") == TOKENS.tolist()
    assert job == {
        "package": "auto-gptq", "source": str(tmp_path / "source"), "output": str(tmp_path / "output"),
        "bits": 8, "group_size": 32, "sym": True, "desc_act": True, "damp": 0.05, "seed": 3,
    }  # fmt: skip


@pytest.mark.parametrize("fault", ["failing", "dense", "not finite", "no config"])
def test_a_failure_leaves_nothing(fault: str, cuda, tiny_model, tmp_path: Path, monkeypatch) -> None:
    model, _ = tiny_model("llama")
    made = tmp_path / "made"
    wrong = {"ignore": ("down_proj",)} if fault == "dense" else {}
    quantize(str(model), str(made), method="rtn", scheme="w4a16", format="gptq", group_size=32, **wrong)
    if fault == "no config":
        (made / "config.json").unlink()
    if fault == "not finite":
        from safetensors.torch import load_file, save_file

        tensors = load_file(made / "model.safetensors")
        tensors["model.layers.2.input_layernorm.weight"][0] = float("nan")
        save_file(tensors, made / "model.safetensors")
    copying_worker(monkeypatch, tmp_path, made)
    if fault == "failing":
        monkeypatch.setattr(run, "WORKER", write_worker(tmp_path / "worker.py", "sys.exit(1)"))
    says = {
        "failing": "auto-gptq failed: it ended with status 1",
        "dense": r"wrote model\.layers\.0\.mlp\.down_proj\.weight in floating point",
        "not finite": r"model\.layers\.2\.input_layernorm\.weight that are not finite",
        "no config": r"left no config\.json",
    }[fault]
    recipe = recipe_for("auto-gptq", model, tmp_path / "results" / "out")
    with pytest.raises(LlmoptError, match=says):
        run.quantize_with_package(recipe, open_source(str(model)), TOKENS, Phases(), started=time.monotonic())
    assert list((tmp_path / "results").iterdir()) == []


def test_the_source_is_never_overwritten(cuda, tiny_model, tmp_path: Path) -> None:
    model, _ = tiny_model("llama")
    recipe = recipe_for("auto-gptq", model, model)
    with pytest.raises(InputError, match="choose another output"):
        run.quantize_with_package(
            recipe, open_source(str(model)), TOKENS, Phases(), started=time.monotonic(), overwrite=True
        )


# --- The real packages, where their environment is there -----------------------------------------------------------

# What they ask CUDA for is answered here, so that the worker itself runs as it is. autoawq's weights come out broken.
ON_CPU = """
import importlib.util, sys, torch
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("worker", {worker!r})
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
if {quantizer!r} == "auto-gptq":
    import auto_gptq.modeling._base as base
    base.CUDA_0 = torch.device("cpu")
    torch.cuda.is_available = lambda: True
    torch.cuda.synchronize = torch.cuda.empty_cache = lambda *_: None
else:
    import awq.quantize.quantizer
    answers = iter([True])
    torch.cuda.is_available = lambda: next(answers, False)
worker.main(sys.argv[1])
"""


@pytest.fixture(scope="module")
def packages() -> Path:
    """The Python of the packages' environment."""
    folder = environment_folder(run.ENVIRONMENT)
    if not (folder / "ready").exists():
        pytest.skip("the environment of auto-gptq and autoawq has not been made on this machine")
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def real_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose shapes both packages take. A row of its first output projection has no negative weight."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.mul_(3)
        model.model.layers[0].self_attn.o_proj.weight[64].abs_().add_(0.05)
    folder = tmp_path_factory.mktemp("real")
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("quantizer", run.PACKAGES)
def test_the_packages_own_refusal_is_one_line(quantizer: str, packages: Path, real_model: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("they do not refuse where there is CUDA")
    run.write_dense(open_source(str(real_model)), tmp_path / "source")
    recipe = recipe_for(quantizer, real_model, tmp_path / "out")
    job = tmp_path / "job.json"
    job.write_text(json.dumps(run._job(recipe, TOKENS, tmp_path)))
    with pytest.raises(LlmoptError, match=rf"^{quantizer} failed: OSError: .*CUDA[^\n]*$"):
        run.run_worker(packages, job, quantizer)


@pytest.mark.parametrize(
    ("quantizer", "others"),
    [("auto-gptq", {"desc_act": True}), ("auto-gptq", {"scheme": "w4a16-asym"}), ("autoawq", {})],
)
def test_the_packages_artifacts_are_read(
    quantizer: str, others: dict, cuda, packages: Path, real_model: Path, tmp_path: Path, monkeypatch
) -> None:
    driver = tmp_path / "on_cpu.py"
    driver.write_text(ON_CPU.format(worker=str(run.WORKER), quantizer=quantizer))
    monkeypatch.setattr(run, "WORKER", driver)
    monkeypatch.setattr(run, "environment_python", lambda *_, **__: packages)
    source = open_source(str(real_model))
    recipe = recipe_for(quantizer, real_model, tmp_path / "out", **others)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 320, (4, 64), generator=generator)
    manifest = run.quantize_with_package(recipe, source, tokens, Phases(), started=time.monotonic())

    assert {module["name"] for module in manifest["modules"]} == set(recipe.schemes)
    assert all(0 < module["error"] < 0.1 for module in manifest["modules"])
    assert set(manifest["quantizer"]["versions"]) == {quantizer, "torch", "transformers", "python"}
    spoiled = [module["name"] for module in manifest["modules"] if module["fallback"]]
    assert spoiled == (["model.layers.0.self_attn.o_proj"] if "scheme" in others else [])
    found = open_source(str(tmp_path / "out"))
    for module in recipe.schemes:
        weight, truth = found.weight(f"{module}.weight"), as_dense(source.weight(f"{module}.weight"))
        assert isinstance(weight, QuantizedTensor)
        if quantizer == "auto-gptq" and module not in spoiled:
            assert (weight.dequantize() - truth).norm() < 0.2 * truth.norm()
