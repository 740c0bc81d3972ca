"""Writing a safetensors file whose tensors come one by one, with none of them kept in memory."""

import json
from pathlib import Path

import torch
from torch import Tensor

from llmopt.weights.safetensors_file import DTYPES, METADATA, TensorPlace

COPIED_AT_ONCE = 16 << 20  # bytes
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsWriter:
    """Takes the tensors of one file. The header, which stands before them, is known only after the last of them: until
    then they lie in a file of their own beside it.

    Attributes:
        size_bytes: of the tensors that were added.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size_bytes = 0
        self._tensors: dict[str, TensorPlace] = {}  # where each lies in the file of their own
        self._data = path.with_name(f"{path.name}.data")
        self._data.touch()

    def add(self, name: str, tensor: Tensor) -> None:
        content = tensor.detach().cpu().contiguous()
        place = TensorPlace(_NAMES[content.dtype], tuple(content.shape), self.size_bytes, content.nbytes)
        self._tensors[name] = place
        with self._data.open("ab") as file:
            file.write(content.flatten().view(torch.uint8).numpy().data)
        self.size_bytes += content.nbytes

    def finish(self, metadata: dict[str, str]) -> None:
        """Write the file. Wide dtypes come first, as the library has them, so that every tensor is aligned."""
        order = sorted(self._tensors.items(), key=lambda item: (-DTYPES[item[1].dtype].itemsize, item[0]))
        header: dict[str, object] = {METADATA: metadata}
        at = 0
        for name, place in order:
            offsets = [at, at := at + place.nbytes]
            header[name] = {"dtype": place.dtype, "shape": list(place.shape), "data_offsets": offsets}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with self.path.open("wb") as file, self._data.open("rb") as data:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, place in order:
                data.seek(place.start)
                for done in range(0, place.nbytes, COPIED_AT_ONCE):
                    file.write(data.read(min(COPIED_AT_ONCE, place.nbytes - done)))
        self._data.unlink()
