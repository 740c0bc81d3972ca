"""An environment of their own for packages that do not run beside this one's: made once, kept in the user's cache."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from llmopt.errors import LlmoptError
from llmopt.progress import Progress, silent

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
# Without this auto-gptq's source package, which pip takes where there is no wheel for this Python, stops for want of
# torch. The kernels that it would build are not needed to quantize.
_PIP_VARIABLES = {"BUILD_CUDA_EXT": "0"}
# How pip's lines begin that tell of one package each, and those that are worth showing.
_PER_PACKAGE = ("Collecting ", "Processing ", "Requirement already satisfied")
_STEPS = (*_PER_PACKAGE, "Downloading ", "Installing ")


def environment_folder(name: str, requirements: Path = REQUIREMENTS) -> Path:
    """Where the environment is, or will be: other requirements or another Python make another one."""
    python = f"{sys.base_prefix} {sys.version_info.major}.{sys.version_info.minor}"
    digest = hashlib.sha256(requirements.read_bytes() + python.encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "llmopt" / "environments" / f"{name}-{digest}"


def environment_python(name: str, requirements: Path = REQUIREMENTS, progress: Progress = silent) -> Path:
    """The Python of the environment that holds these requirements, which is made where it is not there yet.

    It counts as made once a marker lies in it; what a run that was killed left is made anew. Of several processes one
    makes it and the others wait. Raises LlmoptError, with pip's last line and the place of its log, where that fails.
    """
    folder = environment_folder(name, requirements)
    if not _is_ready(folder):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _locked(folder.with_suffix(".lock"), name, progress) as lock:
                if not _is_ready(folder):  # another may have made it in the meantime
                    _make(folder, name, requirements, lock, progress)
        except OSError as error:
            raise LlmoptError(f"cannot make the environment {folder}: {error.strerror or error}") from error
    return _python(folder)


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _marker(folder: Path) -> Path:
    return folder / "ready"


def _is_ready(folder: Path) -> bool:
    # The Python that it was made from may have been removed since, which leaves a link to nothing.
    return _marker(folder).exists() and _python(folder).exists()


@contextmanager
def _locked(path: Path, name: str, progress: Progress) -> Iterator[TextIO]:
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for another process that makes the environment of {name}", 0, 1)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


def _make(folder: Path, name: str, requirements: Path, lock: TextIO, progress: Progress) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    total = max(1, sum(line[:1] not in ("", "#") for line in requirements.read_text().splitlines()))
    install = ["install", "--disable-pip-version-check", "--no-input", "--progress-bar=off", "-r", str(requirements)]
    log_path = folder.with_suffix(".log")
    done, last = 0, ""
    with log_path.open("w", encoding="utf-8") as log:
        for python, *arguments in ((sys.executable, "venv", str(folder)), (str(_python(folder)), "pip", *install)):
            try:
                for line in _output([python, "-I", "-m", *arguments], lock):
                    log.write(line)
                    last = line.strip() or last
                    done += line.startswith(_PER_PACKAGE)
                    if line.startswith(_STEPS):
                        progress(f"making the environment of {name}, once: {last[:50]}", min(done, total), total)
            except subprocess.CalledProcessError as error:
                raise LlmoptError(
                    f"the environment of {name} could not be made: {last or error} (the whole log: {log_path})"
                ) from error
    _marker(folder).touch()


def _output(command: list[str], lock: TextIO) -> Iterator[str]:
    """What a command prints, by lines. Raises CalledProcessError where it fails.

    It holds the lock too: should it outlive this process, it must not write into what the next one makes.
    """
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | _PIP_VARIABLES,
        pass_fds=(lock.fileno(),),
    ) as process:
        yield from process.stdout or ()
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)
