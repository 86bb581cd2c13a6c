"""What a reproduction makes of runs that do not end well."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from common.errors import UserError
from common.log_lines import append_line
from common.recipe import Recipe
from common.run_folder import RunFolder
from common.stage import Stage
from pipeline.reproduction import running
from pipeline.reproduction.claims import TABLES
from pipeline.reproduction.running import Scale


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """One run of the table of gradients, not trained yet."""
    (table,) = (table for table in TABLES if table.key == "T5")
    (recipe,) = Scale("small", str(tmp_path), seeds=1, smoke=True).recipes(table.arms[0])
    return recipe


def fails_in_training(monkeypatch: pytest.MonkeyPatch, events: Sequence[dict[str, object]]) -> list[str]:
    """Makes the training leave these events and fail; returns the stages that are begun."""
    begun: list[str] = []

    def make(recipe: Recipe, stage: Stage, _cluster: str) -> None:
        begun.append(stage.name)
        if stage.name == "train":
            path = RunFolder(recipe.folder).events
            path.parent.mkdir(parents=True, exist_ok=True)
            for event in events:
                append_line(path, event)
            raise UserError("it ended")

    monkeypatch.setattr(running, "_make", make)
    return begun


def not_finite(*sample_ids: int) -> dict[str, object]:
    return {"samples": 8, "step": 1, "event": "not finite", "loss": 1.5, "sample_ids": list(sample_ids)}


def test_a_training_that_diverges_is_a_result_that_the_others_go_on_beside(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = fails_in_training(monkeypatch, [not_finite()])
    running._make_run([recipe], "debug")
    assert begun[-1] == "train"
    assert "its training diverged" in capsys.readouterr().out
    outcome = running._outcome(recipe, ("budget", "sampler"))
    assert outcome.distances
    assert all(math.isinf(distance) for distance in outcome.distances.values())
    running._make_run([recipe], "debug")  # the same command again does not train it again
    assert begun.count("train") == 1


@pytest.mark.parametrize("events", [[], [not_finite(3)], [not_finite(), {"samples": 16, "event": "loss spike"}]])
def test_a_training_that_fails_otherwise_ends_the_reproduction(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, events: list[dict[str, object]]
) -> None:
    fails_in_training(monkeypatch, events)
    with pytest.raises(UserError, match="it ended"):
        running._make_run([recipe], "debug")
    assert not RunFolder(recipe.folder).diverged.exists()
