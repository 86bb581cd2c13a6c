"""Arrays on disk: npz files written atomically, without pickles, with a key of their content."""

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError, errors_as
from common.files import atomic_write
from common.sealed import KEY

Arrays = dict[str, NDArray]


def write_arrays(path: Path, **arrays: NDArray | int | str) -> None:
    """Writes an uncompressed npz file."""
    content = {name: np.asarray(value) for name, value in arrays.items()}
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, allow_pickle=False, **content, **{KEY: np.asarray(_key(content))})


def read_arrays(path: Path, command: str) -> Arrays:
    """All arrays by name. Raises UserError for a damaged file, with `command`, which writes it again."""
    remedy = f"delete it and run {command} again"
    with errors_as(UserError, f"{path}: damaged; {remedy}"), np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
        intact = str(arrays.pop(KEY, None)) == _key(arrays)
    if not intact:
        raise UserError(f"{path}: damaged, or not written by this version; {remedy}")
    return arrays


def _key(arrays: Arrays) -> str:
    """sha256 over names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape};".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
