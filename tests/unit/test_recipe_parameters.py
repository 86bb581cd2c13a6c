"""Only who reads several sections of a recipe takes a recipe: others take the section or the values they read."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = sorted(path for room in ("common", "pipeline", "preprocess") for path in (ROOT / room).rglob("*.py"))
# By function, why it takes a recipe all the same.
ALLOWED = {
    "common/recipe/network.py: diffusion": "beside denoiser_config(recipe), in ten places",
    "pipeline/evaluation/stage.py: fetch": "as a Stage asks",
    "preprocess/beton.py: plan": "as run_command asks",
    "preprocess/encoding/stage.py: fetch": "as a Stage asks",
}


def wasteful(tree: ast.Module) -> Iterator[str]:
    """Functions with a parameter `Recipe` of which they read one field at most, and which pass it on to nobody."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
            if argument.annotation is None or ast.unparse(argument.annotation).strip("'\"") != "Recipe":
                continue
            body = [part for statement in node.body for part in ast.walk(statement)]
            uses = [part for part in body if isinstance(part, ast.Name) and part.id == argument.arg]
            read = [part for part in body if isinstance(part, ast.Attribute) and part.value in uses]
            if len(read) == len(uses) and len({part.attr for part in read}) < 2 and not argument.arg.startswith("_"):
                yield node.name


def test_a_function_that_reads_one_section_takes_that_section() -> None:
    names = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in FILES
        for name in wasteful(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert names - set(ALLOWED) == set()
    assert set(ALLOWED) - names == set(), "no exceptions any more"


def test_what_reads_one_section_is_found() -> None:
    code = """
def one(recipe: Recipe): return recipe.train.batch_size + recipe.train.total_samples
def none(recipe: Recipe): return 1
def two(recipe: Recipe): return recipe.train.batch_size + recipe.seed
def passes(recipe: Recipe): return two(recipe)
def keeps(self, recipe: Recipe): self.recipe = recipe
def ignores(_recipe: Recipe): return 1
"""
    assert list(wasteful(ast.parse(code))) == ["one", "none"]
