"""The stage `compose`, of recipes with a section `demo`."""

from common.recipe import Recipe
from common.stage import Input, Stage, the_recipe


def plan(recipe: Recipe) -> list[str]:
    from preprocess import demo_images

    return demo_images.plan(recipe)


def finished(recipe: Recipe) -> bool:
    from preprocess import demo_images

    return demo_images.finished(recipe)


def compose(recipe: Recipe) -> None:
    from preprocess import demo_images

    demo_images.compose(recipe)


STAGE = Stage(
    name="compose",
    resolve=the_recipe,
    plan=plan,
    finished=finished,
    work=compose,
    inputs=(Input(plan),),
    wanted=lambda recipe: recipe.demo is not None,
    place=lambda recipe: recipe.data.images,
)
