"""Reading a Hugging Face folder of safetensors, one tensor at a time."""

import json
from collections.abc import Callable, KeysView
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmopt.errors import InputError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""safetensors' name of a dtype → torch's."""

T = TypeVar("T")


class SafetensorsCheckpoint:
    """The tensors in a folder's model.safetensors, or in the shards that its index names.

    The headers are read and held against the index when it is made; a tensor only when it is asked for.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises InputError, one line with the file's name, where there is no whole checkpoint."""
        self.folder = Path(folder)
        self._shards: dict[str, Any] = {}
        if not self.folder.is_dir():
            raise InputError(f"{self.folder} is not a folder")
        if (self.folder / INDEX).is_file():
            self._shard_of = self._read_index()
        elif (self.folder / SINGLE).is_file():
            self._shard_of = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        else:
            raise InputError(_nothing_here(self.folder))

    def names(self) -> KeysView[str]:
        return self._shard_of.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._read(name, lambda shard: shard.get_slice(name).get_shape()))

    def dtype(self, name: str) -> torch.dtype:
        stored = self._read(name, lambda shard: shard.get_slice(name).get_dtype())
        if stored not in DTYPES:
            raise InputError(f"{self.folder / self._shard_of[name]}: {name} is {stored}, which is not known here")
        return DTYPES[stored]

    def load(self, name: str) -> Tensor:
        """The tensor, on the CPU, in the dtype it is stored in. Raises InputError for a name that is not here."""
        return self._read(name, lambda shard: shard.get_tensor(name))

    def _read(self, name: str, get: Callable[[Any], T]) -> T:
        if name not in self._shard_of:
            raise InputError(f"{self.folder} holds no tensor {name}")
        file = self._shard_of[name]
        try:
            return get(self._open(file))
        except SafetensorError as error:
            raise InputError(f"{self.folder / file}: {name} cannot be read: {error}") from None

    def _open(self, file: str) -> Any:
        """An open shard. They stay open: only their headers are in memory, the rest is mapped."""
        if file not in self._shards:
            path = self.folder / file
            try:
                self._shards[file] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise InputError(f"{path} is not a whole safetensors file: {error}") from None
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
            present = set(self._open(file).keys())
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
