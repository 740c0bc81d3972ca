"""Reading a Hugging Face folder of safetensors, one tensor at a time."""

import json
from collections.abc import KeysView
from pathlib import Path

import torch
from torch import Tensor

from llmopt.errors import InputError
from llmopt.weights.safetensors_file import SafetensorsFile

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class SafetensorsCheckpoint:
    """The tensors in a folder's model.safetensors, or in the shards that its index names.

    The headers are read and held against the index when it is made; a tensor only when it is asked for.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises InputError, one line with the file's name, where there is no whole checkpoint."""
        self.folder = Path(folder)
        self._shards: dict[str, SafetensorsFile] = {}
        if not self.folder.is_dir():
            raise InputError(f"{self.folder} is not a folder")
        if (self.folder / INDEX).is_file():
            self._shard_of = self._read_index()
        elif (self.folder / SINGLE).is_file():
            self._shard_of = dict.fromkeys(self._open(SINGLE).tensors, SINGLE)
        else:
            raise InputError(_nothing_here(self.folder))

    def names(self) -> KeysView[str]:
        return self._shard_of.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._holding(name).tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._holding(name).dtype(name)

    def load(self, name: str) -> Tensor:
        """The tensor, on the CPU, in the dtype it is stored in. Raises InputError for a name that is not here."""
        return self._holding(name).load(name)

    def _holding(self, name: str) -> SafetensorsFile:
        if name not in self._shard_of:
            raise InputError(f"{self.folder} holds no tensor {name}")
        return self._open(self._shard_of[name])

    def _open(self, file: str) -> SafetensorsFile:
        if file not in self._shards:
            self._shards[file] = SafetensorsFile(self.folder / file)
        return self._shards[file]

    def _read_index(self) -> dict[str, str]:
        """The index's map from tensor to shard, with every shard opened and every tensor found in it."""
        path = self.folder / INDEX
        try:
            index = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path} cannot be read as JSON: {error}") from None
        shard_of = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(shard_of, dict) or not all(isinstance(file, str) for file in shard_of.values()):
            raise InputError(f"{path} has no weight_map from tensor names to file names")
        for file in sorted(set(shard_of.values())):
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise InputError(f"{path} names {file!r}, which is not a .safetensors file beside it")
            if not (self.folder / file).is_file():
                raise InputError(f"{path} names {file}, which is missing")
            present = self._open(file).tensors
            missing = [name for name, where in shard_of.items() if where == file and name not in present]
            if missing:
                raise InputError(f"{path} says that {missing[0]} is in {file}, and it is not")
        return shard_of


def _nothing_here(folder: Path) -> str:
    """Why a folder without safetensors cannot be read."""
    if any(folder.glob("pytorch_model*.bin")):
        return (
            f"{folder} holds only pytorch_model.bin, which is pickle and never loaded: convert it, by "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...), to model.safetensors"
        )
    return f"{folder} holds neither {SINGLE} nor {INDEX}"
