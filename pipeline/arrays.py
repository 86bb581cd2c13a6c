"""Arrays on disk: npz files that appear whole, hold no pickle, and are checked when they are read."""

import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from common.files import atomic_write

# What numpy and zipfile raise on damaged files, found by flipping every bit and cutting at every byte.
DAMAGE = (OSError, ValueError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile)


def write_arrays(path: Path, **arrays: NDArray | int | str) -> None:
    """Stored, not compressed; zip keeps a crc32 of each array."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def read_arrays(path: Path, command: str) -> dict[str, NDArray]:
    """All arrays by name, each checked against its crc32. Raises UserError that names the file and `command`, which
    makes it again.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except DAMAGE as error:
        raise UserError(f"{path}: damaged ({error}); delete it and run {command} again") from None
