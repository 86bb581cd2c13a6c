"""The stage `encode` as its command does it, from a recipe."""

from common.recipe import Recipe
from preprocess.encoding.stage import STAGE


def plan(recipe: Recipe) -> list[str]:
    return list(STAGE.plan(STAGE.resolve(recipe)))


def finished(recipe: Recipe) -> bool:
    return STAGE.is_finished(recipe)


def encode(recipe: Recipe) -> None:
    STAGE.work(STAGE.resolve(recipe))


def encode_part(recipe: Recipe, part: int, parts: int) -> None:
    assert STAGE.part is not None
    STAGE.part(STAGE.resolve(recipe), part, parts)


def merge(recipe: Recipe) -> None:
    assert STAGE.merge is not None
    STAGE.merge(STAGE.resolve(recipe))
