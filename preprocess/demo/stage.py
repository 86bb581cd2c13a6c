"""The stage `compose`, of recipes with a section `demo`."""

from common.stage import Input, Stage, the_recipe
from preprocess.demo.portraits import compose, finished, plan

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
