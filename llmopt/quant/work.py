"""Work in progress: what a quantization has finished so far, so that a crash costs one layer and not hours.

Beside an output NAME lies, while it is being made, the folder `.NAME.work`:

    lock                    held by the process that works on it
    fingerprint.json        everything that decides the bytes of the result
    tokens.safetensors      the calibration tokens
    allocation.json         the schemes that a budget of bits bought
    layer-0007.safetensors  a finished layer
    activations             the calibration samples' activations, where they are too large for the memory

Activations need not survive: the finished layers make them again, in less time than it took to choose their codes. On
a machine of the same kind they come out the same to the last bit.
"""

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch
from safetensors.torch import save_file
from torch import Tensor

import llmopt
from llmopt.errors import InputError, LlmoptError
from llmopt.model.source import ModelSource
from llmopt.quant.kept_layer import checksum, read_layer, write_layer
from llmopt.quant.methods.base import LayerResult
from llmopt.quant.recipe import Recipe
from llmopt.quant.samples import SELF
from llmopt.weights.artifact import ArtifactFile
from llmopt.weights.safetensors_file import SafetensorsFile

logger = logging.getLogger(__name__)

_LOCK, _FINGERPRINT, _TOKENS, _LAYERS = "lock", "fingerprint.json", "tokens.safetensors", "layer-*.safetensors"
_CHECKSUM = "checksum"
_TOKENS_HASH = "the calibration tokens"
_THREADS = "threads"  # sums come out differently for another number of them; a resumed run takes the first run's


class WorkFolder:
    """A context manager that holds the lock. The folder is deleted when its block ends well.

    It also goes where a failure comes before the first layer is finished; later it stays, and a line tells how to go
    on. Methods that need no calibration keep no layers, for they do a layer nearly as fast as it is read back: without
    `begin` there is only the lock.

    Attributes:
        folder: where it is.
    """

    def __init__(self, recipe: Recipe, source: ModelSource, resume: bool = False, overwrite: bool = False) -> None:
        """`resume`: go on with the layers that are there; `overwrite`: forget them where it is not to go on."""
        self.recipe, self.source = recipe, source
        self.output = Path(recipe.options.exports[0].output).expanduser().resolve()
        self.folder = self.output.with_name(f".{self.output.name}.work")
        self.resume, self.overwrite = resume, overwrite
        self._threads = torch.get_num_threads()
        self._kept: dict[str, Any] | None = None  # the fingerprint of the run that is resumed
        self._begun = False

    def __enter__(self) -> "WorkFolder":
        """Raises LlmoptError where another process is at work on the same output, InputError where there are layers
        of an interrupted run, and it was not said what to do with them or they were made of something else."""
        try:
            self._lock = self._take_lock()
        except OSError as error:
            raise InputError(f"cannot write to {self.output}: {error.strerror}") from None
        try:
            self.check_kept()
        except InputError:
            self._lock.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        torch.set_num_threads(self._threads)
        self.spill_file.unlink(missing_ok=True)
        if error is None or not self._is_worth_keeping(error):
            self._clear()
            (self.folder / _LOCK).unlink(missing_ok=True)
            with suppress(OSError):  # the next process may be in it by now
                self.folder.rmdir()
        elif self._begun:
            logger.warning(
                "%d of %d layers are kept: the same command with --resume goes on from there",
                self._count(),
                self._total,
            )
        self._lock.close()

    @property
    def spill_file(self) -> Path:
        """Where activations may go; deleted at the end, however that comes."""
        return self.folder / "activations"

    def begin(self, choose_tokens: Callable[[], Tensor]) -> Tensor:
        """Keep layers from here on. Returns the calibration tokens.

        Raises InputError where they are others than those of the run that is resumed.
        """
        if self._kept is not None:
            tokens = self._resumed_tokens(self._kept, choose_tokens)
            torch.set_num_threads(self._kept[_THREADS])
        else:
            self._clear()
            tokens = choose_tokens()
            how = {_TOKENS_HASH: checksum(tokens), _THREADS: self._threads}
            self._write_start(fingerprint(self.recipe, self.source) | how, tokens)
        self._begun = True
        return tokens

    def once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` gives, in JSON's types, or gave in the run that is resumed, kept as NAME.json."""
        path = self.folder / f"{name}.json"
        try:
            kept = _read_json(path)
        except InputError:  # damaged, so it is made again
            kept = None
        if kept is None:
            kept = json.loads(json.dumps(make()))
            _write_json(path, kept)
        return kept

    def load_layer(self, index: int) -> LayerResult | None:
        """A layer that is finished. None where it is not, or is damaged: then all after it are forgotten too, for they
        were made from it."""
        if not self._begun:
            return None
        result = None
        if self._layer(index).exists():
            result = read_layer(self._layer(index))
            if result is None:
                logger.warning("%s is damaged: that layer and those after it are done again", self._layer(index))
        if result is None:
            for later in range(index, self._total):
                self._layer(later).unlink(missing_ok=True)
        return result

    def keep_layer(self, index: int, result: LayerResult) -> None:
        if self._begun:
            write_layer(self._layer(index), result)

    def _take_lock(self) -> TextIO:
        """The lock belongs to the process and goes with it, even where it is killed."""
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                file = (self.folder / _LOCK).open("a")
            except FileNotFoundError:  # the process before has just taken its folder away
                continue
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(file.fileno()).st_ino == (self.folder / _LOCK).stat().st_ino:
                    return file
            except BlockingIOError:
                file.close()
                raise LlmoptError(
                    f"another process is writing {self.output}: wait for it, or choose another output"
                ) from None
            except FileNotFoundError:
                pass
            file.close()

    def check_kept(self) -> None:
        """See whether there is something to resume, and that it is what is wanted."""
        if not self.resume:
            if self._count() and not self.overwrite:
                raise InputError(
                    f"an interrupted run has finished {self._count()} of {self._total} layers of {self.output}: give "
                    "--resume to go on with them, or --overwrite to begin anew"
                )
            return
        self._kept = self._read_fingerprint()
        if self._kept is None:
            logger.warning("there is nothing to resume at %s: beginning with the first layer", self.output)
            return
        wanted = fingerprint(self.recipe, self.source)
        for key in {**wanted, **self._kept}:
            before, now = self._kept.get(key), wanted.get(key)
            if key not in (_TOKENS_HASH, _THREADS) and before != now:
                hashes = isinstance(before, str) and len(before) == 64
                raise self._refusal(f"{key} has changed" if hashes else f"{key} was {before}, and now it is {now}")

    def _refusal(self, why: str) -> InputError:
        return InputError(
            f"cannot go on with the interrupted run of {self.output}: {why}; make it as it was, or give --overwrite "
            "without --resume to begin anew"
        )

    @property
    def _total(self) -> int:
        return self.source.config.num_layers

    def _layer(self, index: int) -> Path:
        return self.folder / _LAYERS.replace("*", f"{index:04}")

    def _count(self) -> int:
        return len(list(self.folder.glob(_LAYERS)))

    def _is_worth_keeping(self, error: BaseException) -> bool:
        # The tokens alone may be an hour's sampling, but what failed on its input will fail again.
        return self._count() > 0 or (isinstance(error, KeyboardInterrupt) and self._begun)

    def _clear(self) -> None:
        for path in self.folder.glob("*"):  # none, where somebody has taken the folder away
            if path.name != _LOCK:
                path.unlink()

    def _read_fingerprint(self) -> dict[str, Any] | None:
        """None where no run has begun here."""
        return _read_json(self.folder / _FINGERPRINT)

    def _write_start(self, kept: dict[str, Any], tokens: Tensor) -> None:
        with ArtifactFile(self.folder / _TOKENS, overwrite=True) as path:
            save_file({"tokens": tokens}, path)
        _write_json(self.folder / _FINGERPRINT, kept)

    def _resumed_tokens(self, kept: dict[str, Any], choose_tokens: Callable[[], Tensor]) -> Tensor:
        """A text is read again, since it may have changed. What the model wrote itself need not be written again."""
        tokens = self._read_tokens() if self.recipe.calibration == SELF else None
        if tokens is None or checksum(tokens) != kept.get(_TOKENS_HASH):
            tokens = choose_tokens()
        if checksum(tokens) != kept.get(_TOKENS_HASH):
            raise self._refusal("the calibration text has changed")
        return tokens

    def _read_tokens(self) -> Tensor | None:
        try:
            return SafetensorsFile(self.folder / _TOKENS).load("tokens")
        except (InputError, KeyError):
            return None


def fingerprint(recipe: Recipe, source: ModelSource) -> dict[str, Any]:
    """Everything but the calibration tokens that decides what a layer becomes, by names that a user knows.

    The model counts by its whole content, not by its path, so that it may move meanwhile.
    """
    options = {key: value for key, value in recipe.to_dict().items() if key != "model"}
    schemes = "\n".join(f"{name} {scheme}" for name, scheme in sorted(recipe.modules.items()))
    kept = options | {
        "device": recipe.device,
        "the version of llmopt": llmopt.__version__,
        "the version of torch": torch.__version__,
        "the model": _hash_model(source),
        "the choice of schemes": _hash(schemes),
    }
    return json.loads(json.dumps(kept))  # as it will be read back


def _read_json(path: Path) -> dict[str, Any] | None:
    """A file of ours, None where there is none. Raises InputError where it is damaged."""
    if not path.exists():
        return None
    try:
        kept = json.loads(path.read_text())
        if kept.pop(_CHECKSUM) == _hash(json.dumps(kept, sort_keys=True)):
            return kept
    except (ValueError, AttributeError, KeyError, RecursionError):
        pass
    raise InputError(f"{path} is damaged, so there is no going on: give --overwrite, without --resume")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with ArtifactFile(path, overwrite=True) as partial:
        partial.write_text(json.dumps({_CHECKSUM: _hash(json.dumps(content, sort_keys=True)), **content}, indent=2))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _hash_model(source: ModelSource) -> str:
    digest = hashlib.sha256(str(source.config).encode())
    for path in source.files():
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
