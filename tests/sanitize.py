"""Tests the CPU kernels under the address and undefined-behaviour sanitizers, on every instruction set that this
processor has. Run by `make sanitize`; exit status 1 where a test fails or a sanitizer reports anything.

The extension is built once more, into build/sanitize, and takes the place of the usual one in the tests' process alone.
Memory that torch allocates has guards as well, so that a kernel that reads beyond its activations is found too.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "sanitize"
SITE = FOLDER / "site"
MODULE = "llmopt.kernels._cpu"
TESTS = ["tests/backend", "tests/quant/test_codes.py"]
INSIDE = "LLMOPT_SANITIZED"  # set in the process that runs the tests


def build() -> None:
    """Build into build/sanitize, with functions' names for the reports."""
    settings = [f"build-dir={FOLDER / 'build'}", "cmake.define.LLMOPT_SANITIZE=ON", "install.strip=false"]
    settings.append("cmake.build-type=RelWithDebInfo")  # nanobind strips a Release
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--upgrade", "--target", str(SITE), *(f"--config-settings={setting}" for setting in settings), "."]
    subprocess.run(command, cwd=ROOT, check=True)


def library(name: str) -> str:
    """Where the compiler has a library."""
    compiler = os.environ.get("CXX", "g++")
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = found.stdout.strip()
    if not Path(path).is_absolute():
        sys.exit(f"{compiler} has no {name}: install its sanitizers' libraries")
    return path


def environment() -> dict[str, str]:
    # The sanitizer's memory must come before all other's; it looks for the functions that throw exceptions when it
    # starts, before Python has loaded the library that has them.
    preload = [library("libasan.so"), library("libstdc++.so.6")]
    return os.environ | {
        INSIDE: "1",
        "LD_PRELOAD": ":".join(preload),
        # Python itself frees little before it ends, so that leaks cannot be told from what is still held.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:detect_stack_use_after_return=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
        "PYTHONMALLOC": "malloc",  # numpy's and Python's own pools would have no guards
    }


def run_tests(arguments: list[str]) -> int:
    """In the tests' process: put the sanitized extension in the usual one's place, then run pytest."""
    import llmopt.kernels
    import pytest

    (path,) = SITE.glob("llmopt/kernels/_cpu*.so")
    if any(call not in path.read_bytes() for call in (b"__asan_report", b"__ubsan_handle")):
        sys.exit(f"{path} was built without sanitizers")
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[MODULE] = llmopt.kernels._cpu = module
    print("instruction sets:", ", ".join(module.instruction_sets()), flush=True)
    chosen = any(Path(argument.split("::")[0]).exists() for argument in arguments)
    # Not captured: pytest would take with it what a process writes that is about to die.
    return pytest.main(["-q", "-s", "-p", "no:cacheprovider", *([] if chosen else TESTS), *arguments])


def main() -> int:
    if INSIDE in os.environ:
        return run_tests(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, epilog="Whatever else is given goes to pytest.")
    parser.add_argument("--no-build", action="store_true", help="use what was built before")
    arguments, of_pytest = parser.parse_known_args()
    if not arguments.no_build:
        build()
    status = subprocess.run([sys.executable, __file__, *of_pytest], cwd=ROOT, env=environment()).returncode
    if status < 0:
        print(f"the tests were ended by signal {-status}: the sanitizer's report is above", file=sys.stderr)
    return 1 if status else 0


if __name__ == "__main__":
    sys.exit(main())
