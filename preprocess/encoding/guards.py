"""What stops an encoding from outside, told in one line: memory, and another run in the same folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from common.errors import UserError
from common.files import folder_lock
from common.recipe import Recipe


@contextmanager
def memory_errors_as_user_errors(recipe: Recipe) -> Iterator[None]:
    """Makes a UserError of a GPU without room for a batch."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(
            f"vae.batch_size: the device has no memory for {recipe.vae.batch_size} images of "
            f"{recipe.data.resolution} px at once; set fewer"
        ) from None


@contextmanager
def at_work(folder: Path, part: int, parts: int) -> Iterator[None]:
    """Keeps every other run out of `folder`: one whole run at a time, or each part of one array once."""
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
