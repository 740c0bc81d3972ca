"""Crash-safe writing: a result appears under its name whole, or not at all.

It is built beside its final place under a hidden name, brought to the disk, and renamed as the last step. What goes
wrong in between leaves nothing; only a process that is killed leaves the hidden, unfinished copy, which the next one
that writes under the same name removes.
"""

import errno
import os
import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType

import psutil
from safetensors import SafetensorError

from llmopt.errors import InputError, LlmoptError

_FULL = (errno.ENOSPC, errno.EDQUOT)


class _Artifact(ABC):
    """A context manager that gives the path to write to and, when its block ends well, puts it in its place."""

    def __init__(self, output: Path | str, overwrite: bool = False) -> None:
        """Raises InputError where `output` cannot be written, or would replace something without `overwrite`."""
        self.output = Path(output).expanduser().resolve()
        self.overwrite = overwrite
        self.partial = self._hidden("partial")
        try:
            self._clear_up()
            self._check_output()
        except OSError as error:
            raise InputError(f"cannot write to {self.output}: {_reason(error)}") from None

    def __enter__(self) -> Path:
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            _remove(self.partial)
            self._begin()
        except OSError as error:
            raise InputError(f"cannot write to {self.output}: {_reason(error)}") from None
        return self.partial

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._check_output()
                _sync(self.partial)
                self._publish()
        except OSError as failure:
            error = failure
            raise LlmoptError(f"cannot finish {self.output}: {_reason(failure)}") from failure
        finally:
            _remove(self.partial)
        if _is_full_disk(error):
            raise LlmoptError(f"the disk of {self.output} is full; nothing was written") from error
        if isinstance(error, SafetensorError | OSError):
            raise LlmoptError(f"writing {self.output} failed, and nothing was written: {error}") from error

    def _hidden(self, kind: str) -> Path:
        """A name beside the output for this process's own use."""
        return self.output.with_name(f".{self.output.name}.{kind}-{os.getpid()}")

    def _clear_up(self) -> None:
        """Remove what processes that were killed have left; give its place back to what one had just moved aside."""
        for path in _leftovers(self.output, "replaced"):
            if not self.output.exists():
                path.replace(self.output)
        for kind in ("partial", "replaced"):
            for path in _leftovers(self.output, kind):
                _remove(path)

    @abstractmethod
    def _check_output(self) -> None:
        """Raise InputError where the final place is taken."""

    @abstractmethod
    def _begin(self) -> None:
        """Make the hidden path ready to be written."""

    def _publish(self) -> None:
        self.partial.replace(self.output)
        _sync_entry(self.output.parent)


class ArtifactFolder(_Artifact):
    """A folder that appears whole: `with ArtifactFolder("out") as folder:` write into `folder`.

    An existing folder that is not empty is only replaced with `overwrite`, and only where it holds a file named
    `marker`, which tells that it was made here and is not somebody's whole work. That is the last step: it steps aside
    under a hidden name and is deleted once the new one is in its place.
    """

    def __init__(self, output: Path | str, overwrite: bool = False, marker: str | None = None) -> None:
        self.marker = marker
        super().__init__(output, overwrite)

    def _check_output(self) -> None:
        if self.output.exists() and not self.output.is_dir():
            raise InputError(f"{self.output} is a file; give a folder to write to")
        if not self.output.is_dir() or not any(self.output.iterdir()):
            return
        if not self.overwrite:
            raise InputError(f"{self.output} exists and is not empty: choose another output, or overwrite it")
        if self.marker is not None and not (self.output / self.marker).exists():
            raise InputError(f"{self.output} holds no {self.marker}, so it is not an artifact to overwrite")

    def _begin(self) -> None:
        self.partial.mkdir()

    def _publish(self) -> None:
        aside = self._hidden("replaced")
        _remove(aside)
        replaced = self.output.is_dir()
        if replaced:
            self.output.replace(aside)
        try:
            super()._publish()
        except OSError:
            if replaced:
                aside.replace(self.output)
            raise
        _remove(aside)


class ArtifactFile(_Artifact):
    """A file that appears whole: `with ArtifactFile("out.gguf") as path:` write the file at `path`."""

    def _check_output(self) -> None:
        if self.output.is_dir():
            raise InputError(f"{self.output} is a folder; give a file to write to")
        if not self.overwrite and self.output.exists():
            raise InputError(f"{self.output} exists: choose another output, or overwrite it")

    def _begin(self) -> None:
        self.partial.touch()


def _leftovers(output: Path, kind: str) -> list[Path]:
    """What is hidden beside an output by processes that are no more."""
    prefix = f".{output.name}.{kind}-"
    beside = output.parent.iterdir() if output.parent.is_dir() else ()
    return [path for path in beside if path.name.startswith(prefix) and not _is_alive(path.name.removeprefix(prefix))]


def _is_alive(process: str) -> bool:
    """Whether there is a process of this number; what is no number counts as one that lives."""
    return not process.isdecimal() or psutil.pid_exists(int(process))


def _sync(path: Path) -> None:
    """Bring a file, or a folder with all in it, to the disk."""
    for folder, _, files in os.walk(path):
        for file in files:
            _sync_entry(Path(folder, file))
        _sync_entry(Path(folder))
    if path.is_file():
        _sync_entry(path)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_full_disk(error: BaseException | None) -> bool:
    """safetensors tells of a full disk only in its message, by the system's number of the error."""
    if isinstance(error, SafetensorError):
        return any(f"os error {number}" in str(error) for number in _FULL)
    return isinstance(error, OSError) and error.errno in _FULL


def _reason(error: OSError) -> str:
    return "the disk is full" if _is_full_disk(error) else str(error.strerror or error)
