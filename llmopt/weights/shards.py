"""Writing a Hugging Face checkpoint in safetensors, with no more than one shard in memory."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmopt.errors import LlmoptError
from llmopt.weights.checkpoint import INDEX, SINGLE

SHARD_BYTES = 4 << 30
_METADATA = {"format": "pt"}  # transformers refuses a file that does not name its framework


class ShardWriter:
    """Takes tensors one by one and writes them in order, each shard as soon as it is full.

    Attributes:
        folder: where the files go; it must exist.
        size_bytes: of the tensors that were added.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.size_bytes = 0
        self._shard_bytes = shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shard_of: dict[str, int] = {}
        self._shards = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a copy of a tensor. Raises LlmoptError for a name that was there before, NaN and infinity."""
        if name in self._shard_of or name in self._pending:
            raise LlmoptError(f"{name} would be written twice")
        # torch cannot ask 8-bit floats whether they are finite.
        if tensor.is_floating_point() and not torch.isfinite(tensor if tensor.itemsize > 1 else tensor.float()).all():
            raise LlmoptError(f"{name} holds values that are not finite")
        if self._pending and self._pending_bytes + tensor.nbytes > self._shard_bytes:
            self._flush()
        # A copy, because safetensors refuses tensors that share memory, and the caller may go on using its own.
        self._pending[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        self._pending_bytes += tensor.nbytes
        self.size_bytes += tensor.nbytes

    def close(self) -> None:
        """Write what is left, and give the files their final names: how many there are is known only now."""
        self._flush()
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

    def _flush(self) -> None:
        file = self._unnumbered(self._shards)
        save_file(self._pending, file, metadata=_METADATA)
        file.chmod(0o644)  # safetensors makes files that only their owner can read
        self._shard_of |= dict.fromkeys(self._pending, self._shards)
        self._shards += 1
        self._pending, self._pending_bytes = {}, 0

    def _unnumbered(self, shard: int) -> Path:
        return self.folder / f"shard-{shard}.safetensors"
