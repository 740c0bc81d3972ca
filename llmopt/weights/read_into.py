"""Reading a part of a file into memory that is there already."""

from pathlib import Path

import numpy as np

from llmopt.errors import InputError


def read_into(path: Path, offset: int, content: np.ndarray, name: str) -> None:
    """Fill an array of bytes from a file, from an offset on. `name` says what it is, in errors.

    Raises InputError where the file cannot be read, or has changed since its header was read so that it ends sooner.
    """
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            rest = content.data
            while len(rest) and (count := file.readinto(rest)):  # one call reads 2 GiB at most
                rest = rest[count:]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if len(rest):
        raise InputError(f"{path} has been cut short since it was opened: {name} is not whole any more")
