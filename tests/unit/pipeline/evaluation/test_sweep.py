"""Ways of sampling at given budgets: exact budgets, finished points kept, one table and one picture."""

import csv
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from common.errors import UserError
from common.recipe import Recipe
from common.recipe.sampling import SWEEP_AXES
from common.run_folder import RunFolder
from fpdm import Calibration, Diffusion, Way, calibration, count_blocks
from fpdm.sampling import require_sound
from pipeline.evaluation import measurements as evaluation
from pipeline.evaluation import sweep_stage
from pipeline.evaluation.plots import sweep_plot
from pipeline.evaluation.sweep import Sweep, points
from pipeline.evaluation.sweep_stage import STAGE as SWEEP
from pipeline.evaluation.sweep_table import read_table, table
from pipeline.sampling import generate as generation
from pipeline.sampling import plans
from pipeline.sampling.plans import blocks_an_image
from tests.conftest import copied, run_stage
from tests.unit.pipeline.evaluation.test_evaluation import sampled  # noqa: F401


@pytest.fixture
def recipe(sampled: Recipe, tmp_path: Path) -> Recipe:  # noqa: F811
    made = copied(sampled, tmp_path / "runs")
    return swept(made, budgets=(8, 16), iterations=(2,), sampler=("ddim",))


def swept(recipe: Recipe, **fields: Any) -> Recipe:
    return replace(recipe, sweep=replace(recipe.sweep, **fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"iterations": (1, 2, 3)},
        {"num_steps": (1, 2, 3)},
        {"allocation": ("constant", "more_at_noise", "calibrated"), "budgets": (17, 23)},
        {"guidance_scale": (1.0, 2.0), "budgets": (16, 24)},
        {"iterate_guidance": (0.5,), "guidance_scale": (1.0, 2.0), "budgets": (30, 60)},
    ],
)
def test_every_point_costs_its_budget_exactly(recipe: Recipe, fields: dict[str, Any]) -> None:
    found, _ = points(swept(recipe, **fields))
    assert len(found) > 2
    assert all(point.blocks == point.budget == blocks_an_image(made) for point, made in found.items())


def test_what_a_budget_does_not_pay_for_is_said(recipe: Recipe) -> None:
    found, left_out = points(swept(recipe, num_steps=(2, 4)))
    assert [(point.budget, point.num_steps) for point in found] == [(8, 2), (16, 2), (16, 4)]
    assert left_out == ["ddim, 4 steps, 8 blocks: 4 steps with one iteration cost 9"]
    with pytest.raises(UserError, match=r"sweep: no combination can be drawn; .* cost 3"):
        points(swept(recipe, budgets=(2,)))


def test_dit_takes_the_steps_that_a_budget_pays_for(recipe: Recipe) -> None:
    dit = replace(recipe, model=replace(recipe.model, kind="dit", depth=3))
    found, _ = points(dit)
    assert [(point.num_steps, point.blocks) for point in found] == [(2, 6), (5, 15)]
    assert Sweep(dit).in_words(next(iter(found))) == "6 blocks: ddim, 2 steps, guidance 1"


def test_a_sweep_ends_in_a_table_and_an_image_and_keeps_finished_points(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep_stage.measure_part(Sweep(recipe), 0, 2)  # the first job of two
    assert len(read_table(RunFolder(recipe.folder))["rows"]) == 1
    run_stage(SWEEP, recipe)
    with open(recipe.folder / "sweep/table.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["blocks"] for line in lines] == ["8", "16"]
    assert all(float(line["FD (EfficientNet-Lite0)"]) > 0 for line in lines)
    assert (recipe.folder / "sweep/table.md").read_text().count("\n") == 4
    with Image.open(recipe.folder / "sweep/distances.png") as picture:
        assert picture.width > 500
    monkeypatch.setattr(evaluation.Evaluation, "measure", None)
    run_stage(SWEEP, recipe)  # nothing left to do
    more = swept(recipe, budgets=(8, 16, 32))
    Sweep(more).write_tables()
    assert len(read_table(RunFolder(recipe.folder))["rows"]) == 2  # what an earlier sweep measured counts


def test_a_way_whose_samples_diverge_has_no_numbers_and_the_others_have_theirs(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bind = generation.bind_sampler

    def diverging(drawn: Recipe, *arguments: Any) -> Any:
        draw = bind(drawn, *arguments)

        def latents(**way: Any) -> torch.Tensor:
            found = draw(**way) * (float("nan") if len(way["iterations"]) == 2 else 1.0)
            require_sound(found)
            return found

        return latents

    monkeypatch.setattr(generation, "bind_sampler", diverging)
    sweep = Sweep(recipe)
    sweep_stage.measure(sweep)
    assert [row["budget"] for row in read_table(RunFolder(recipe.folder))["rows"]] == [16]
    assert "no numbers: 8 blocks: ddim, 2 steps x 2 iterations (constant, reuse always), guidance 1: samples 0 to " in (
        capsys.readouterr().out
    )
    again = Sweep(recipe)
    assert again.finished
    assert "non-finite" in next(sweep_stage.plan(again))
    alone = Sweep(swept(recipe, budgets=(8,)))
    sweep_stage.measure(alone)
    assert alone.finished
    assert not RunFolder(recipe.folder).sweep_table.exists()
    assert capsys.readouterr().out.endswith("to draw it again)\nnothing to tabulate\n")


def test_the_distance_to_the_limit_is_nothing_at_the_limit(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "LIMIT_STEPS", 6)
    settings = {"sampler": ("ddim", "multistep"), "order": (2, 3), "spacing": ("trailing",), "spacing_power": (2.0,)}
    settings |= {"start_extrapolation": (calibration.MOVED_ON,)}
    run_stage(SWEEP, swept(recipe, budgets=(36,), iterations=(4,), distance_to_limit=True, **settings))
    rows = [dict(row) for row in read_table(RunFolder(recipe.folder))["rows"]]
    found = {(row["sampler"], row["order"]): row["numbers"]["limit"]["value"] for row in rows}
    assert set(found) == {("ddim", 2), ("multistep", 2), ("multistep", 3)}
    assert found.pop(("multistep", 3)) == pytest.approx(0, abs=1e-6)
    assert min(found.values()) > 1e-3
    assert "FD (EfficientNet-Lite0) to the limit" in (recipe.folder / "sweep/table.md").read_text()


def test_a_fitted_sampler_is_a_row_of_its_own(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the fit of so small a network is worth, it is taken here."""

    def fitted(_bind: Any, process: Diffusion, way: Way, *, outer_depth: int, **_: Any) -> Calibration:
        found = calibration.fit_start(process, count_blocks(way.iterations or (), outer_depth), 3, outer_depth)
        assert found is not None
        return Calibration(way=found, error=0.1, error_before=0.2)

    monkeypatch.setattr(plans, "calibrate", fitted)
    both = swept(recipe, budgets=(20,), allocation=("constant", "calibrated"))
    run_stage(SWEEP, replace(both, sample=replace(both.sample, sampler="ddim")))
    rows = {row["sampler"]: row for row in read_table(RunFolder(recipe.folder))["rows"]}
    assert (rows["ddim"]["num_steps"], rows["ddim"]["start_extrapolation"]) == (5, 0.0)
    assert (rows["fitted"]["num_steps"], rows["fitted"]["order"], rows["fitted"]["start_extrapolation"]) == (
        4,
        None,
        None,
    )
    assert rows["fitted"]["blocks"] == 20
    assert "| fitted |" in (recipe.folder / "sweep/table.md").read_text()
    assert "None" not in (recipe.folder / "sweep/table.md").read_text()
    assert RunFolder(recipe.folder).sweep_plot.exists()


def test_several_ranks_are_refused(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.ranks.rank_and_world_size", lambda: (0, 2))
    with pytest.raises(UserError, match="--cluster with --jobs shares its points"):
        run_stage(SWEEP, recipe)


def test_every_axis_is_combined_and_those_that_vary_are_columns(recipe: Recipe) -> None:
    varied = {"sampler": ("ddim", "multistep"), "spacing": ("trailing",), "spacing_power": (1.0, 1.5)}
    found, _ = points(swept(recipe, budgets=(16,), start_extrapolation=(0.0, 0.5), **varied))
    drawn = [
        (each.sample.sampler, each.sample.spacing_power, each.sample.start_extrapolation) for each in found.values()
    ]
    assert sorted(drawn) == sorted(product(("ddim", "multistep"), (1.0, 1.5), (0.0, 0.5)))
    lines = list(sweep_stage.plan(Sweep(swept(recipe, budgets=(16,), start_extrapolation=(0.0, 0.5), **varied))))
    assert len(set(lines)) == len(found)
    assert "spacing_power 1.5, start_extrapolation 0.5: to be measured" in lines[-1]
    rows = [asdict(point) | {"distance": "FID", "count": 2, "numbers": {}} for point in found]
    assert [name for name in table(rows)[0] if name in SWEEP_AXES] == [
        *("sampler", "allocation", "reuse", "guidance_scale", "spacing_power", "start_extrapolation")
    ]


def test_two_numbers_of_iterations_are_drawn_beside_each_other(recipe: Recipe) -> None:
    rows = [
        {
            **dict.fromkeys(SWEEP_AXES, 1),
            "num_steps": budget // (each + 2),
            "budget": budget,
            "blocks": budget,
            "iterations": each,
            "distance": "FID",
            "numbers": {"frechet": {"value": 1000 / budget + each}},
        }
        for budget in (140, 280)
        for each in (2, 8)
    ]
    assert sweep_plot(rows)[:4] == b"\x89PNG"
