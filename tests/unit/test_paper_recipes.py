"""The recipes of the paper's experiments: what `run.py --dry-run` checks, and what their headers say they cost."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from common.loading import load_recipe
from common.recipe import Recipe
from common.stage_checks import check_stages
from pipeline.evaluation.sweep import points
from pipeline.planning.page import plan_page
from pipeline.stages import select
from pipeline.training.operations import describe_cost, training_flops, with_end

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes/paper").glob("*.yaml"))
OURS = sorted((ROOT / "recipes").glob("*256*.yaml"))  # of the paper's data


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_the_paper_can_be_run_and_costs_what_its_header_says(path: Path) -> None:
    recipe, head = load_recipe(path, ["launch.gpu=a100"]), header(path)
    stages = select(recipe, None)
    check_stages(recipe, [replace(stage, inputs=(), fetch=None) for stage in stages], "local")  # without their data
    page = dict(line.split(": ", 1) for line in plan_page(recipe, stages, "local", measure=False))
    assert {"network", "images", "disk", "memory", "train", "time"} <= page.keys()
    assert not points(recipe)[1], "a combination of its sweep cannot be drawn"
    assert f"--config recipes/paper/{path.name}" in head
    assert re.search(r"Published (FID|distance)", head)
    assert "GB of" in head
    if "Cost: no training" not in head:
        assert stated_cost(head) == counted_cost(recipe)


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_a_recipe_beside_a_published_number_says_what_it_and_the_papers_model_cost(path: Path) -> None:
    recipe, head = load_recipe(path), header(path)
    assert stated_cost(head) == counted_cost(recipe)
    stated = re.search(r"([\d.]+) times as many operations: (recipes/paper/\w+\.yaml)", head)
    longer = training_flops(load_recipe(ROOT / stated[2])) / training_flops(recipe)
    assert stated[1] == f"{longer:.1f}"


def header(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))


def stated_cost(head: str) -> str:
    stated = re.search(r"Cost: ([\d,]+ PFLOP, [\d,]+ V100-hours) at 42 % of the peak", head)
    assert stated, "no cost in the header"
    return stated[1]


def counted_cost(recipe: Recipe) -> str:
    pflop, hours = re.fullmatch(r"(.*) PFLOP, (.*) V100-hours at 42% of the peak", describe_cost(recipe)).groups()
    return f"{float(pflop.replace(',', '')):,.0f} PFLOP, {float(hours.replace(',', '')):,.0f} V100-hours"


def test_dit_and_fpdm_get_the_same_operations_and_dit_the_papers_steps() -> None:
    ends = {name: with_end(load_recipe(ROOT / f"recipes/paper/{name}.yaml")) for name in ("imagenet_dit", "ffhq_dit")}
    assert ends["imagenet_dit"].train.total_samples / 512 == pytest.approx(400_000, rel=1e-3)
    assert ends["ffhq_dit"].train.total_samples / 512 == pytest.approx(100_000, rel=1e-3)
