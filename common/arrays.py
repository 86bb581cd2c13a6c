"""Arrays on disk: npz files that appear whole, hold no pickle, and are sealed by a key of all they hold."""

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError, errors_as
from common.files import atomic_write
from common.sealed import KEY

Arrays = dict[str, NDArray]


def write_arrays(path: Path, **arrays: NDArray | int | str) -> None:
    """Stored, not compressed."""
    made = {name: np.asarray(value) for name, value in arrays.items()}
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, allow_pickle=False, **made, **{KEY: np.asarray(_key(made))})


def read_arrays(path: Path, command: str) -> Arrays:
    """All arrays by name, as they were written. Raises UserError that names the file and `command`, which makes it
    again.
    """
    remedy = f"delete it and run {command} again"
    with errors_as(UserError, f"{path}: damaged; {remedy}"), np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
        whole = str(arrays.pop(KEY, None)) == _key(arrays)
    if not whole:
        raise UserError(f"{path}: damaged, or not written by this version; {remedy}")
    return arrays


def _key(arrays: Arrays) -> str:
    """Of names, types, shapes and numbers."""
    found = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        found.update(f"{name} {array.dtype.str} {array.shape};".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()
