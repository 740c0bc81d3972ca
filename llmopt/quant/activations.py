"""The activations of all calibration samples on their way through the model: in memory, or in a file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import psutil
import torch
from torch import Tensor

SHARE_OF_FREE_MEMORY = 4  # the part of it that activations may take before they go to the disk


class Batches(Protocol):
    """What holds batches of samples, each [samples, length, hidden]."""

    def __iter__(self) -> Iterator[Tensor]: ...

    def __setitem__(self, index: int, batch: Tensor, /) -> None: ...


class BatchesOnDisk:
    """Batches in a file, float32, one in memory at a time.

    They are read and written rather than mapped: pages of a mapping would count as this process's memory all the same.
    """

    def __init__(self, path: Path, batches: Iterator[Tensor], device: torch.device) -> None:
        self.path = path
        self.device = device
        self._shapes: list[torch.Size] = []
        self._starts = [0]
        with path.open("wb") as file:
            for batch in batches:
                file.write(_bytes_of(batch))
                self._shapes.append(batch.shape)
                self._starts.append(file.tell())

    def __iter__(self) -> Iterator[Tensor]:
        for shape, start in zip(self._shapes, self._starts, strict=False):
            batch = torch.empty(shape)
            with self.path.open("rb") as file:
                file.seek(start)
                file.readinto(_bytes_of(batch))
            yield batch.to(self.device)

    def __setitem__(self, index: int, batch: Tensor) -> None:
        with self.path.open("r+b") as file:
            file.seek(self._starts[index])
            file.write(_bytes_of(batch))


def hold(batches: Iterator[Tensor], path: Path | None, device: torch.device) -> Batches:
    """Batches in memory, or in the file of that path."""
    return list(batches) if path is None else BatchesOnDisk(path, batches, device)


def fit_in_memory(tokens: Tensor, hidden_size: int) -> bool:
    """Whether the activations of these tokens leave enough of this machine's memory to others."""
    return tokens.numel() * hidden_size * 4 <= psutil.virtual_memory().available // SHARE_OF_FREE_MEMORY


def _bytes_of(batch: Tensor) -> memoryview:
    """The memory of a batch, or of a copy where that is on another device or not in one piece."""
    return batch.cpu().contiguous().view(-1).view(torch.uint8).numpy().data
