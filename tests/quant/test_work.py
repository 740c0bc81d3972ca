"""Interrupted quantizations: what is kept, when it is used again, and that the result is the same to the last byte."""

import logging
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from llmopt.errors import InputError, LlmoptError
from llmopt.model.source import open_source
from llmopt.quant import pipeline, samples
from llmopt.quant.kept_layer import read_layer, write_layer
from llmopt.quant.methods.base import LayerResult, ModuleReport
from llmopt.quant.options import make_options
from llmopt.quant.pipeline import quantize
from llmopt.quant.recipe import resolve
from llmopt.quant.work import WorkFolder
from llmopt.weights.quantized import QuantizedTensor, TwoLevel

OPTIONS = {"method": "gptq", "scheme": "w4a16", "group_size": 32, "calibration": "builtin", "samples": 4, "seq_len": 64}
LAYERS = 3


class Crash(Exception):
    pass


def crash_at(layer: int, error: type[BaseException] = Crash):
    """A progress function that fails when the layer of this number begins."""

    def progress(phase: str, done: int, total: int) -> None:
        if phase.startswith("quantizing") and done == layer:
            raise error

    return progress


def interrupt(folder: Path, output: Path, layer: int = 2, **options) -> Path:
    """Run until a layer begins; returns the work folder that is left."""
    with pytest.raises(Crash):
        quantize(str(folder), str(output), **OPTIONS | options, progress=crash_at(layer))
    assert not output.exists()
    return output.with_name(f".{output.name}.work")


def content(output: Path) -> dict[str, bytes]:
    """All files of an artifact but the manifest, which tells the time."""
    files = [output] if output.is_file() else sorted(output.iterdir())
    return {path.name: path.read_bytes() for path in files if path.name != "llmopt.json"}


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def model(tiny_model) -> Path:
    return tiny_model("llama")[0]


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run that nothing interrupts writes."""
    output = tmp_path_factory.mktemp("whole") / "out"
    quantize(str(model), str(output), **OPTIONS)
    return content(output)


@pytest.mark.parametrize("layer", range(1, LAYERS))
def test_a_resumed_run_gives_the_same_bytes(model: Path, whole: dict, tmp_path: Path, layer: int, monkeypatch) -> None:
    work = interrupt(model, tmp_path / "out", layer)
    assert len(list(work.glob("layer-*"))) == layer
    done = []
    quantize_layer = pipeline._quantize_layer
    monkeypatch.setattr(pipeline, "_quantize_layer", lambda *args: done.append(args[2]) or quantize_layer(*args))
    result = quantize(str(model), str(tmp_path / "out"), **OPTIONS, resume=True)
    assert done == list(range(layer, LAYERS))
    assert content(tmp_path / "out") == whole
    assert listing(tmp_path) == ["out"]
    assert len(result["modules"]) == 7 * LAYERS


@pytest.mark.parametrize(
    "options",
    [
        {"method": "awq", "scheme": "w4a16-asym"},
        {"method": "gptq", "scheme": "w4a16", "desc_act": True},
        {"method": "rtn", "scheme": "nvfp4", "group_size": None},
        {"method": "smoothquant", "scheme": "w8a8", "group_size": None},
        {"method": "gptq", "scheme": "w4a16", "ignore": (r"layers\.0\.",)},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_method_resumes(model: Path, tmp_path: Path, options: dict) -> None:
    quantize(str(model), str(tmp_path / "whole"), **OPTIONS | options)
    interrupt(model, tmp_path / "out", 2, **options)
    quantize(str(model), str(tmp_path / "out"), **OPTIONS | options, resume=True)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_an_interrupted_run_is_neither_lost_nor_taken_up_unasked(model: Path, whole: dict, tmp_path: Path) -> None:
    work = interrupt(model, tmp_path / "out")
    with pytest.raises(InputError, match=r"finished 2 of 3 layers of .*out: give --resume .* or --overwrite"):
        quantize(str(model), str(tmp_path / "out"), **OPTIONS)
    assert len(list(work.glob("layer-*"))) == 2
    quantize(str(model), str(tmp_path / "out"), **OPTIONS, overwrite=True)
    assert content(tmp_path / "out") == whole
    assert listing(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"scheme": "w8a16"}, "scheme was w4a16, and now it is w8a16"),
        ({"group_size": -1}, "group_size was 32, and now it is -1"),
        ({"damp": 0.02}, "damp was 0.01, and now it is 0.02"),
        ({"seed": 1}, "seed was 0, and now it is 1"),
        ({"method": "rtn", "calibration": None}, "method was gptq, and now it is rtn"),
        ({"calibration": "self"}, "calibration was builtin, and now it is self"),
    ],
)
def test_another_recipe_is_refused(model: Path, tmp_path: Path, changed: dict, says: str) -> None:
    work = interrupt(model, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in work.iterdir()}
    with pytest.raises(InputError, match=says):
        quantize(str(model), str(tmp_path / "out"), **OPTIONS | changed, resume=True)
    assert {path.name: path.read_bytes() for path in work.iterdir()} == before


def test_another_model_is_refused_and_a_moved_one_is_not(model: Path, whole: dict, tmp_path: Path) -> None:
    interrupt(model, tmp_path / "out")
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in model.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    weights = copy / "model.safetensors"
    middle, size = weights.stat().st_size // 2, weights.stat().st_size
    original = weights.read_bytes()
    weights.write_bytes(original[:middle] + bytes([original[middle] ^ 1]) + original[middle + 1 :])
    assert weights.stat().st_size == size
    with pytest.raises(InputError, match="the model has changed"):
        quantize(str(copy), str(tmp_path / "out"), **OPTIONS, resume=True)
    weights.write_bytes(original)
    quantize(str(copy), str(tmp_path / "out"), **OPTIONS, resume=True)
    assert content(tmp_path / "out") == whole


def test_another_calibration_text_is_refused(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and then the other cat came there too. " * 200)
    interrupt(model, tmp_path / "out", calibration=str(text))
    text.write_text(text.read_text().replace("sat", "stood", 1))
    with pytest.raises(InputError, match="the calibration text has changed"):
        quantize(str(model), str(tmp_path / "out"), **OPTIONS | {"calibration": str(text)}, resume=True)


def test_what_the_model_sampled_from_itself_is_not_sampled_again(model: Path, tmp_path: Path, monkeypatch) -> None:
    quantize(str(model), str(tmp_path / "whole"), **OPTIONS | {"calibration": "self"})
    work = interrupt(model, tmp_path / "out", calibration="self")
    sampled = []
    sample = samples._sample_from_model
    monkeypatch.setattr(samples, "_sample_from_model", lambda *args: sampled.append(1) or sample(*args))
    with pytest.raises(Crash):
        quantize(
            str(model), str(tmp_path / "out"), **OPTIONS | {"calibration": "self"}, resume=True, progress=crash_at(2)
        )
    assert not sampled
    (work / "tokens.safetensors").write_bytes(b"damaged")
    quantize(str(model), str(tmp_path / "out"), **OPTIONS | {"calibration": "self"}, resume=True)
    assert sampled
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("harm", ["cut", "flip-header", "flip-middle", "flip-end", "empty", "missing"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_damaged_layer_and_those_after_it_are_done_again(
    model: Path, whole: dict, tmp_path: Path, layer: int, harm: str, caplog
) -> None:
    work = interrupt(model, tmp_path / "out")
    file = work / f"layer-000{layer}.safetensors"
    data = bytearray(file.read_bytes())
    if harm.startswith("flip"):
        place = {"header": 60, "middle": len(data) // 2, "end": len(data) - 1}[harm.removeprefix("flip-")]
        data[place] ^= 1
    file.write_bytes(data[: {"cut": len(data) // 2, "empty": 0}.get(harm)])
    if harm == "missing":
        file.unlink()
    caplog.clear()
    quantize(str(model), str(tmp_path / "out"), **OPTIONS, resume=True)
    assert ("damaged" in caplog.text) == (harm != "missing")
    assert content(tmp_path / "out") == whole


@pytest.mark.parametrize("harm", [("{", "["), ('"threads": ', '"threads": 1'), ('"checksum"', '"checksun"')])
def test_a_damaged_fingerprint_is_said(model: Path, tmp_path: Path, harm: tuple[str, str]) -> None:
    path = interrupt(model, tmp_path / "out") / "fingerprint.json"
    path.write_text(path.read_text().replace(*harm))
    with pytest.raises(InputError, match=r"fingerprint\.json is damaged"):
        quantize(str(model), str(tmp_path / "out"), **OPTIONS, resume=True)


def test_ctrl_c_says_how_to_go_on(model: Path, whole: dict, tmp_path: Path, caplog) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize(str(model), str(tmp_path / "out"), **OPTIONS, progress=crash_at(1, KeyboardInterrupt))
    assert caplog.messages == ["1 of 3 layers are kept: the same command with --resume goes on from there"]
    quantize(str(model), str(tmp_path / "out"), **OPTIONS, resume=True)
    assert content(tmp_path / "out") == whole


def test_a_resumed_run_takes_as_many_threads_as_the_first(model: Path, whole: dict, tmp_path: Path) -> None:
    used, threads = [], torch.get_num_threads()
    interrupt(model, tmp_path / "out")
    try:
        torch.set_num_threads(threads + 1)
        quantize(
            str(model), str(tmp_path / "out"), **OPTIONS, resume=True,
            progress=lambda *_: used.append(torch.get_num_threads()),
        )  # fmt: skip
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert used[-1] == threads
    assert content(tmp_path / "out") == whole


def test_nothing_to_resume_is_said_and_no_failure(model: Path, whole: dict, tmp_path: Path, caplog) -> None:
    quantize(str(model), str(tmp_path / "out"), **OPTIONS, resume=True)
    assert "nothing to resume" in caplog.text
    assert content(tmp_path / "out") == whole


def test_a_failure_before_the_first_layer_leaves_nothing(model: Path, tmp_path: Path) -> None:
    with pytest.raises(Crash):
        quantize(str(model), str(tmp_path / "out"), **OPTIONS, progress=crash_at(0))
    assert listing(tmp_path) == []


def test_a_failure_to_publish_keeps_the_layers(model: Path, whole: dict, tmp_path: Path, monkeypatch) -> None:
    replace = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if self.name.startswith(".out.partial"):
            raise OSError("the disk has gone")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(LlmoptError, match="the disk has gone"):
        quantize(str(model), str(tmp_path / "out"), **OPTIONS)
    monkeypatch.undo()
    assert listing(tmp_path) == [".out.work"]
    assert len(list((tmp_path / ".out.work").glob("layer-*"))) == LAYERS
    quantize(str(model), str(tmp_path / "out"), **OPTIONS, resume=True)
    assert content(tmp_path / "out") == whole


def test_two_at_once_on_one_output_are_refused(model: Path, tmp_path: Path) -> None:
    """The second comes while the first is at its second layer, with other options, and without calibration."""
    refusals = []

    def progress(phase: str, done: int, total: int) -> None:
        if phase.startswith("quantizing") and done == 1:
            for options in (OPTIONS, {"method": "rtn", "scheme": "w8a16", "group_size": 32}):
                for more in ({}, {"overwrite": True}, {"resume": True}):
                    with pytest.raises(LlmoptError) as caught:
                        quantize(str(model), str(tmp_path / "out"), **options, **more)
                    refusals.append(str(caught.value))

    quantize(str(model), str(tmp_path / "out"), **OPTIONS, progress=progress)
    assert refusals == [f"another process is writing {tmp_path / 'out'}: wait for it, or choose another output"] * 6
    assert listing(tmp_path) == ["out"]


def test_many_at_once_make_one_artifact(model: Path, tmp_path: Path) -> None:
    """Whoever comes while the lock is held, or is just being taken away, is refused or finds all done."""
    outcomes = []

    def attempt() -> None:
        try:
            quantize(str(model), str(tmp_path / "out"), method="rtn", scheme="w8a16", group_size=32)
            outcomes.append("done")
        except LlmoptError as error:
            outcomes.append("refused" if "another process" in str(error) else "exists")

    threads = [threading.Thread(target=attempt) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("done") == 1
    assert len(outcomes) == 6
    assert listing(tmp_path) == ["out"]


def test_killed_again_and_again_it_still_gives_the_same_bytes(model: Path, whole: dict, tmp_path: Path) -> None:
    """SIGKILL at random moments of real processes; they resume until one comes through."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["llmopt.quant.pipeline"])
    dice = random.Random(0)
    kills: list[int] = []  # how many layers were finished at each
    patience = 2.0  # seconds; more where a busy machine finishes no layer in that time
    for _ in range(40):
        enough = len(kills) >= 4 and len(set(kills)) >= 2
        process = processes.Process(target=_resume, args=(str(model), str(tmp_path / "out")))
        process.start()
        process.join(None if enough else dice.uniform(0.1, patience))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills.append(len(list((tmp_path / ".out.work").glob("layer-*"))))
            patience *= 1.3 if kills[-1] == max(kills[:-1], default=0) else 1
        elif enough:
            break
        if (tmp_path / "out").exists():  # it was done before it was killed
            assert content(tmp_path / "out") == whole
            for left in tmp_path.iterdir():
                shutil.rmtree(left)
    assert process.exitcode == 0
    assert content(tmp_path / "out") == whole
    assert listing(tmp_path) == ["out"]


def _resume(model: str, output: str) -> None:
    def linger(phase: str, done: int, total: int) -> None:
        time.sleep(0.2)

    logging.disable()
    torch.set_num_threads(2)
    pipeline.run(make_options({"model": model, "exports": [{"output": output}], **OPTIONS}), False, linger, resume=True)


def test_a_layer_in_any_form_comes_back_as_it_was(tmp_path: Path) -> None:
    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(0, 16, shape, dtype=torch.uint8)

    shared = torch.tensor([[0.5]])
    weights = {
        "plain": torch.rand(3),
        "turned": torch.rand(4, 6).bfloat16().T,
        "symmetric": QuantizedTensor(codes(4, 64), torch.rand(4, 2).half(), None, None, 4),
        "ordered": QuantizedTensor(codes(4, 64), torch.rand(4, 2).half(), codes(4, 2), codes(64).int() % 2, 4),
        "rounded": QuantizedTensor(codes(4, 64), torch.rand(4, 1), None, None, 8, activations="int8"),
        "k": QuantizedTensor(
            codes(2, 256), TwoLevel(codes(2, 8), torch.rand(2, 1).half()), None, None, 4,
            minimums=TwoLevel(codes(2, 8), torch.rand(2, 1).half()),
        ),
        "fp4": QuantizedTensor(
            codes(2, 32), TwoLevel(torch.rand(2, 2).to(torch.float8_e4m3fn), shared), None, None, 4, number="fp4"
        ),
        "fp4-too": QuantizedTensor(
            codes(2, 32), TwoLevel(torch.rand(2, 2).to(torch.float8_e4m3fn), shared), None, None, 4, number="fp4"
        ),
        "mx": QuantizedTensor(codes(2, 32), torch.ones(2, 1).to(torch.float8_e8m0fnu), None, None, 4, number="fp4"),
    }  # fmt: skip
    reports = [ModuleReport("a", "gptq", 0.1, "damped"), ModuleReport("b", "rtn", 1e-30)]
    write_layer(tmp_path / "layer", LayerResult(weights, reports))
    found = read_layer(tmp_path / "layer")
    assert found is not None
    assert found.modules == reports
    assert list(found.weights) == list(weights)
    for name, weight in weights.items():
        again = found.weights[name]
        if isinstance(weight, torch.Tensor):
            assert again.dtype == weight.dtype
            assert torch.equal(again, weight)
        else:
            assert repr(again) == repr(weight)
            assert torch.equal(again.dequantize(), weight.dequantize())


def test_every_flipped_byte_of_a_layer_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "layer"
    weight = QuantizedTensor(torch.zeros(1, 8, dtype=torch.uint8), torch.ones(1, 1), None, None, 4)
    write_layer(path, LayerResult({"w": weight}, [ModuleReport("w", "gptq", 0.5)]))
    data = path.read_bytes()
    for place in range(len(data)):
        broken = bytearray(data)
        broken[place] ^= 1 << place % 8
        path.write_bytes(broken)
        found = read_layer(path)
        # A blank that pads the header may become another one: that says nothing, and is the only thing that passes.
        if found is not None:
            assert data[place : place + 1].isspace()
            assert repr(found.weights["w"]) == repr(weight)
            assert found.modules == [ModuleReport("w", "gptq", 0.5)]


def test_what_is_to_be_made_once_is_made_once(model: Path, tmp_path: Path) -> None:
    source = open_source(str(model))
    given = {"model": str(model), "exports": [{"output": str(tmp_path / "out")}], **OPTIONS}
    recipe = resolve(make_options(given), source.config)
    made = []

    def ask(resume: bool) -> dict:
        with pytest.raises(KeyboardInterrupt), WorkFolder(recipe, source, resume) as work:
            work.begin(lambda: torch.zeros(4, 64, dtype=torch.int64))
            found = work.once("budget", lambda: made.append(1) or {"a": [1.5, None], "é": len(made)})
            raise KeyboardInterrupt
        return found

    assert ask(resume=False) == {"a": [1.5, None], "é": 1}
    assert ask(resume=True) == {"a": [1.5, None], "é": 1}
    path = tmp_path / ".out.work" / "budget.json"
    path.write_bytes(path.read_bytes().replace(b"1.5", b"2.5"))
    assert ask(resume=True) == {"a": [1.5, None], "é": 2}
    assert ask(resume=False) == {"a": [1.5, None], "é": 3}


def test_a_work_folder_that_somebody_takes_away_does_no_harm(model: Path, whole: dict, tmp_path: Path) -> None:
    def take_away(phase: str, done: int, total: int) -> None:
        if phase.startswith("quantizing") and done == 2:
            work = tmp_path / ".out.work"
            for path in work.iterdir():
                path.unlink()
            work.rmdir()

    quantize(str(model), str(tmp_path / "out"), **OPTIONS, progress=take_away)
    assert content(tmp_path / "out") == whole
