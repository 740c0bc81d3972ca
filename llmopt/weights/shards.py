"""Writing a Hugging Face checkpoint in safetensors, with no more than one tensor in memory."""

import json
from pathlib import Path

from torch import Tensor

from llmopt.errors import LlmoptError
from llmopt.weights.checkpoint import INDEX, SINGLE
from llmopt.weights.numbers import all_finite
from llmopt.weights.safetensors_writer import SafetensorsWriter

SHARD_BYTES = 4 << 30
_METADATA = {"format": "pt"}  # transformers refuses a file that does not name its framework


class ShardWriter:
    """Takes tensors one by one, in the order in which shards are to hold them.

    Attributes:
        folder: where the files go; it must exist.
        size_bytes: of the tensors that were added.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.size_bytes = 0
        self._shard_bytes = shard_bytes
        self._shard_of: dict[str, int] = {}
        self._shards = 0  # that are written
        self._open: SafetensorsWriter | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor. Raises LlmoptError for a name that was there before, NaN and infinity."""
        if name in self._shard_of:
            raise LlmoptError(f"{name} would be written twice")
        if tensor.is_floating_point() and not all_finite(tensor):
            raise LlmoptError(f"{name} holds values that are not finite")
        if self._open is not None and self._open.size_bytes + tensor.nbytes > self._shard_bytes:
            self._finish_shard()
        if self._open is None:
            self._open = SafetensorsWriter(self._unnumbered(self._shards))
        self._open.add(name, tensor)
        self._shard_of[name] = self._shards
        self.size_bytes += tensor.nbytes

    def close(self) -> None:
        """Finish the last shard, and give the files their final names: how many there are is known only now."""
        self._finish_shard()
        if self._shards == 1:
            self._unnumbered(0).rename(self.folder / SINGLE)
            return
        names = [f"model-{i + 1:05}-of-{self._shards:05}.safetensors" for i in range(self._shards)]
        for i, name in enumerate(names):
            self._unnumbered(i).rename(self.folder / name)
        index = {
            "metadata": {"total_size": self.size_bytes},
            "weight_map": {name: names[shard] for name, shard in self._shard_of.items()},
        }
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _finish_shard(self) -> None:
        if self._open is not None:
            self._open.finish(_METADATA)
            self._open = None
            self._shards += 1

    def _unnumbered(self, shard: int) -> Path:
        return self.folder / f"shard-{shard}.safetensors"
