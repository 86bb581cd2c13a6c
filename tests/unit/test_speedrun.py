"""The speedrun's table from logs: where a curve meets the target, means and intervals over seeds."""

import json
import math
from pathlib import Path

import pytest

from benchmarks.speedrun import INGREDIENTS, Measured, curve, overrides, reached, row
from common.loading import load_recipe
from common.recipe import denoiser_config
from common.run_folder import RunFolder
from pipeline.training.schedule import step_iterations
from pipeline.training.throughput import step_flops

ROOT = Path(__file__).parents[2]


def test_a_curve_has_the_logs_distances_with_seconds_and_flops_of_all_steps_before(tmp_path: Path) -> None:
    recipe = load_recipe(
        ROOT / "recipes/demo.yaml", [f"runs={tmp_path}", "train.total_samples=128", "train.batch_size=32"]
    )
    lines = [
        {"samples": 64, "step_seconds": 3.0, "previews_seconds": 1.0},
        {"samples": 128, "step_seconds": 2.0, "previews_seconds": 0.5, "distance": 200.0},
    ]
    path = RunFolder(recipe.folder).log
    path.parent.mkdir(parents=True)
    path.write_text("".join(log_line_of(line) for line in lines))
    (point,) = curve(recipe)
    flops = [step_flops(denoiser_config(recipe), step_iterations(recipe.train, 0, start)) for start in (0, 32, 64, 96)]
    assert point == Measured(128, 2 * 2.0 + 2 * 1.5, pytest.approx(32 * sum(flops)), 200.0)


def log_line_of(values: dict[str, float]) -> str:
    from common.log_lines import log_line

    line = log_line(values)
    return line if isinstance(line, str) else line.decode()


def test_a_target_is_met_between_two_measurements_or_not_at_all() -> None:
    points = [Measured(100, 10.0, 1e12, 300.0), Measured(200, 20.0, 2e12, 200.0), Measured(300, 30.0, 3e12, 100.0)]
    assert reached(points, 150.0) == Measured(250, 25.0, 2.5e12, 150.0)
    assert reached(points, 300.0) == points[0]
    assert reached(points, 50.0) is None
    rows = row("all", [points, [*points[:2], Measured(300, 30.0, 3e12, 120.0)]], 150.0)
    assert rows.distance == pytest.approx(110.0)
    assert rows.interval == pytest.approx(12.706 * math.sqrt(200) / math.sqrt(2), rel=1e-3)
    assert rows.samples == pytest.approx((250 + 262.5) / 2, abs=1)
    assert row("paper", [points, points[:2]], 150.0).samples is None


@pytest.mark.parametrize("ingredient", INGREDIENTS)
def test_a_variant_changes_the_fields_of_its_ingredient_alone(ingredient: str) -> None:
    present, absent = INGREDIENTS[ingredient]
    assert set(overrides("all")) ^ set(overrides(f"without-{ingredient}")) == {
        f"{field}={fields[field]}" for fields in (present, absent) for field in fields
    }
    recipe = load_recipe(ROOT / "recipes/demo.yaml", overrides("all"))
    assert recipe == load_recipe(ROOT / "recipes/demo.yaml", [])  # the recipe has them all


def test_every_variant_is_a_recipe() -> None:
    for name in INGREDIENTS:
        for variant in ("paper", f"with-{name}", f"without-{name}"):
            load_recipe(ROOT / "recipes/demo.yaml", overrides(variant))
    assert json.dumps(sorted(overrides("paper"))) != json.dumps(sorted(overrides("all")))
