"""`recipe.yaml` in a run folder: the resolved recipe, as training wrote it."""

from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from common.errors import UserError, errors_as
from common.files import atomic_write
from common.loading import dump_recipe, parse_recipe
from common.recipe import Recipe
from common.run_folder import RunFolder
from common.sealed import read_bytes

_SEAL = "# sha256 of all above: "


def write_recipe(recipe: Recipe) -> None:
    """The resolved recipe, and in a last line, a comment, the checksum that `read_recipe` compares."""
    text = dump_recipe(recipe)
    with atomic_write(RunFolder(recipe.folder).recipe) as file:
        file.write_bytes(f"{text}{_SEAL}{sha256(text.encode()).hexdigest()}\n".encode())


def read_recipe(folder: Path) -> Recipe:
    """Of a run folder, wherever it lies now. One that a person wrote there has no checksum.

    Raises UserError where it was changed after training wrote it.
    """
    path = RunFolder(folder).recipe
    if not path.is_file():
        raise UserError(f"{folder}: no run's folder, such as runs/demo: it holds no {path.name}")
    text, sealed, key = read_bytes(path).rpartition(_SEAL.encode())
    if sealed and sha256(text).hexdigest().encode() != key.strip():
        raise UserError(f"{path}: changed after it was written; put it back as it was, or name another run")
    with errors_as(UserError, f"{path}: not a text file"):
        settings = (text if sealed else key).decode()
    recipe = parse_recipe(settings, (), path)
    with errors_as(UserError, f"{folder}: no name of a run; rename the folder to letters, digits, '.', '_' and '-'"):
        return replace(recipe, name=folder.name, runs=str(folder.parent))
