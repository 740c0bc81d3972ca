"""Kills a real quantization ten times over, at random layers, resumes it each time, and holds the artifact against one
that nothing interrupted, byte by byte. Run by `make soak-resume`; exit status 1 where they differ."""

import argparse
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

KILLS = 10
OPTIONS = [
    "--method", "gptq", "--scheme", "w4a16", "--group-size", "64", "--calibration", "builtin", "--samples", "16",
    "--seq-len", "256",
]  # fmt: skip


def quantize(model: str, output: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "llmopt.cli.main", "quantize", model, "--output", str(output), *OPTIONS, *more]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def finished_layers(output: Path) -> int:
    return len(list(output.with_name(f".{output.name}.work").glob("layer-*")))


def kill_at(process: subprocess.Popen, output: Path, layer: int, pause: float) -> None:
    """SIGKILL a moment after so many layers are finished."""
    while finished_layers(output) < layer:
        if process.poll() is not None:
            sys.exit(f"the run ended by itself, with status {process.returncode}, before layer {layer}")
        time.sleep(0.02)
    time.sleep(pause)
    process.kill()
    process.wait()


def content(output: Path) -> dict[str, bytes]:
    """All files but the manifest, which tells the time."""
    return {path.name: path.read_bytes() for path in sorted(output.iterdir()) if path.name != "llmopt.json"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--layers", type=int, default=30, help="how many the model has")
    parser.add_argument("--folder", type=Path, default=Path("build/soak-resume"))
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    seed = random.randrange(1 << 32) if arguments.seed is None else arguments.seed
    print(f"seed {seed}")
    dice = random.Random(seed)
    shutil.rmtree(arguments.folder, ignore_errors=True)
    arguments.folder.mkdir(parents=True)
    whole, resumed = arguments.folder / "whole", arguments.folder / "resumed"
    if quantize(arguments.model, whole).wait():
        sys.exit("the run that was not to be interrupted failed")
    print("kill  layers finished  seconds")
    for kill, layer in enumerate(sorted(dice.sample(range(1, arguments.layers - 2), KILLS)), 1):
        started = time.monotonic()
        kill_at(quantize(arguments.model, resumed, "--resume"), resumed, layer, dice.uniform(0, 2))
        print(f"{kill:4}  {finished_layers(resumed):15}  {time.monotonic() - started:7.1f}", flush=True)
    if quantize(arguments.model, resumed, "--resume").wait():
        sys.exit("the last run failed")
    before, after = content(whole), content(resumed)
    different = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    left = [path.name for path in arguments.folder.iterdir() if path.name.startswith(".")]
    print(f"{len(after)} files, different: {different or 'none'}; left behind: {left or 'nothing'}")
    sys.exit(bool(different or left))


if __name__ == "__main__":
    main()
