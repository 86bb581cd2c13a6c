"""What a recipe leaves to its data: the number of classes, and epochs as a number of samples."""

from dataclasses import replace
from pathlib import Path

from common.errors import NoDataYet, UserError
from common.loading import expanded
from common.recipe import Data, Recipe, check_together
from preprocess import beton
from preprocess.shards import INDEX, Cache, LatentShards
from preprocess.shards.forms import read_local_index


def from_data(recipe: Recipe) -> Recipe:
    """Resolves `model.num_classes` and `train.epochs` from the index of the shards; nothing is read without them.

    Raises NoDataYet where the shards are missing, and UserError where what they say does not go with the recipe.
    """
    model, train = recipe.model, recipe.train
    left = [
        name
        for name, is_left in (("model.num_classes", not model.num_classes), ("train.epochs", train.epochs))
        if is_left
    ]
    if not left:
        return recipe
    try:
        shards = open_latents(recipe.data)
    except UserError as error:
        raise NoDataYet(f"{left[0]}: is left to the data, and {error}") from None
    if not model.num_classes:
        model = replace(model, num_classes=shards.num_classes)
    if train.epochs:
        train = replace(train, epochs=None, total_samples=train.epochs * len(shards))
    resolved = replace(recipe, model=model, train=train)
    try:
        check_together(resolved)
    except ValueError as error:
        raise UserError(f"{recipe.data.shards}: {error}") from None
    return resolved


def class_names(recipe: Recipe) -> list[str] | None:
    """The classes' names by their number, from the list of the training shards; None where there is none of them."""
    shards = Path(recipe.data.shards)
    names = read_local_index(shards)["class_names"] if (shards / INDEX).exists() else []
    return list(names) if len(names) == recipe.model.num_classes else None


def open_latents(data: Data) -> LatentShards:
    """The latents, in a folder or at an address, in either format. Raises UserError where they are missing."""
    address = data.shards.rstrip("/")
    if data.format == "ffcv":
        address = f"{address}/{beton.FOLDER}"
        if "://" not in address and not (Path(address) / INDEX).is_file():
            raise UserError(f"data.format: {address} has no {INDEX}; run preprocess/beton.py, or set data.format=tar")
    if data.cache is None:
        return LatentShards(address)
    folder = expanded("data.cache", data.cache)
    return LatentShards(address, Cache(Path(folder), None if data.cache_gb is None else int(data.cache_gb * 1e9)))
