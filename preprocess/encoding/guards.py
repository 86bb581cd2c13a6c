"""Guards of an encoding: GPU memory, and other runs in the same folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from common.errors import UserError
from common.files import folder_lock
from common.recipe import Recipe


@contextmanager
def memory_errors_as_user_errors(recipe: Recipe) -> Iterator[None]:
    """Re-raises an out-of-memory error of the GPU as a UserError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(
            f"vae.batch_size: the device has no memory for {recipe.vae.batch_size} images of "
            f"{recipe.data.resolution} px at once; set fewer"
        ) from None


@contextmanager
def at_work(folder: Path, part: int, parts: int) -> Iterator[None]:
    """Locks `folder` for one run, or for the parts of one job array, each at most once."""
    if parts == 1:
        with folder_lock(folder):
            yield
        return
    with folder_lock(folder, shared=True), folder_lock(folder, f".lock-{part}-of-{parts}"):
        for other in folder.glob(".lock-*"):
            if not other.name.endswith(f"-of-{parts}"):
                with folder_lock(folder, other.name):  # raises where an array of another size is at work
                    pass
        yield
