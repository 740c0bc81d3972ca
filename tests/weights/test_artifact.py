import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from llmopt.errors import InputError, LlmoptError
from llmopt.weights.artifact import ArtifactFile, ArtifactFolder


def listing(folder: Path) -> list[str]:
    """Everything in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole_at_the_end(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with ArtifactFolder(output) as folder:
        (folder / "a.txt").write_text("a")
        (folder / "sub").mkdir()
        (folder / "sub" / "b.txt").write_text("b")
        assert not output.exists()
        assert folder.parent == output.parent
        assert folder.name.startswith(".out.partial-")
    assert listing(output.parent) == ["out"]
    assert (output / "sub" / "b.txt").read_text() == "b"


def test_a_file_appears_whole_at_the_end(tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    with ArtifactFile(output) as path:
        path.write_bytes(b"GGUF")
        assert not output.exists()
    assert listing(tmp_path) == ["out.gguf"]
    assert output.read_bytes() == b"GGUF"


@pytest.mark.parametrize("kind", [ArtifactFolder, ArtifactFile])
@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_an_error_leaves_nothing(tmp_path: Path, kind, error: BaseException) -> None:
    with pytest.raises(type(error)), kind(tmp_path / "out") as path:
        (path / "a" if path.is_dir() else path).write_text("half")
        raise error
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_said_in_one_line(tmp_path: Path, error: Exception) -> None:
    full = pytest.raises(LlmoptError, match=r"disk of .*out is full; nothing was written")
    with full as caught, ArtifactFolder(tmp_path / "out"):
        raise error
    assert caught.value.exit_status == 3
    assert listing(tmp_path) == []


def test_a_disk_that_fills_up_while_syncing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LlmoptError, match=r"cannot finish .*: the disk is full"), ArtifactFolder(tmp_path / "out"):
        pass
    assert listing(tmp_path) == []


def test_what_exists_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "old").touch()
    file.write_text("old")
    for refused in (lambda: ArtifactFolder(folder), lambda: ArtifactFile(file)):
        with pytest.raises(InputError, match="exists"):
            refused()
    with ArtifactFolder(folder, overwrite=True) as partial:
        (partial / "new").touch()
        assert listing(folder) == ["old"]
    with ArtifactFile(file, overwrite=True) as path:
        path.write_text("new")
        assert file.read_text() == "old"
    assert listing(folder) == ["new"]
    assert file.read_text() == "new"
    assert listing(tmp_path) == ["file", "folder"]


def test_a_failed_overwrite_keeps_the_old(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(ValueError, match="no"), ArtifactFolder(tmp_path / "out", overwrite=True):
        raise ValueError("no")
    assert listing(tmp_path / "out") == ["old"]


def test_a_failed_swap_puts_the_old_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    replace = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with (
        pytest.raises(LlmoptError, match="Input/output error"),
        ArtifactFolder(tmp_path / "out", overwrite=True) as folder,
    ):
        (folder / "new").touch()
    assert listing(tmp_path) == ["out"]
    assert listing(tmp_path / "out") == ["old"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with ArtifactFolder(tmp_path / "out") as folder:
        (folder / "new").touch()
    assert listing(tmp_path / "out") == ["new"]


def test_what_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists"), ArtifactFile(tmp_path / "out"):
        (tmp_path / "out").write_text("theirs")
    assert (tmp_path / "out").read_text() == "theirs"
    assert listing(tmp_path) == ["out"]


def test_a_folder_and_a_file_are_not_mistaken(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="is a file"):
        ArtifactFolder(tmp_path / "file", overwrite=True)
    with pytest.raises(InputError, match="is a folder"):
        ArtifactFile(tmp_path / "folder", overwrite=True)
    with pytest.raises(InputError, match="cannot write to"), ArtifactFile(tmp_path / "file" / "out"):
        pass
    with pytest.raises(InputError, match="File name too long"):
        ArtifactFile(tmp_path / ("x" * 300))


@pytest.mark.parametrize("kind", ["ArtifactFolder", "ArtifactFile"])
def test_a_killed_process_leaves_nothing_under_the_name(tmp_path: Path, kind: str) -> None:
    script = (
        "import os, signal, sys\n"
        f"from llmopt.weights.artifact import {kind}\n"
        f"with {kind}(sys.argv[1]) as path:\n"
        "    (path / 'a' if path.is_dir() else path).write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert len(listing(tmp_path)) == 1  # the hidden, unfinished copy
    with ArtifactFolder(tmp_path / "out") as folder:
        assert len(listing(tmp_path)) == 1  # this process's own
        (folder / "whole").touch()
    assert listing(tmp_path) == ["out"]
    assert listing(tmp_path / "out") == ["whole"]


def test_what_a_living_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    for name in (f".out.partial-{os.getppid()}", ".out.partial-notes", ".other.partial-1"):
        (tmp_path / name).write_text("theirs")
    before = listing(tmp_path)
    with ArtifactFile(tmp_path / "out") as path:
        path.touch()
    assert listing(tmp_path) == sorted([*before, "out"])


def test_a_swap_that_was_killed_is_taken_back(tmp_path: Path) -> None:
    """Between the two renames the old folder is under a hidden name and nothing under its own."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for name in (f".out.replaced-{gone.pid}", f".out.partial-{gone.pid}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    with pytest.raises(InputError, match="exists and is not empty"):
        ArtifactFolder(tmp_path / "out")
    assert listing(tmp_path) == ["out"]
    assert listing(tmp_path / "out") == [f".out.replaced-{gone.pid}"]
