"""What a run says while it works: a line that is overwritten, warnings that stay, and time, where it is known."""

import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from common.log_lines import append_line
from common.recipe import Recipe
from common.run_folder import RunFolder
from pipeline.planning import progress
from pipeline.planning.progress import TimeLeft, status_line, training_left
from pipeline.stages import select


@pytest.fixture
def left(tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> TimeLeft:
    """Of a run whose stages were expected to take so many seconds."""
    seconds = {"encode": 100.0, "train": 1000.0, "sample": 60.0, "evaluate": 30.0, "report": 10.0}
    monkeypatch.setattr(progress, "expected_seconds", lambda recipe, stages: seconds)
    made = TimeLeft(tiny_recipe, select(tiny_recipe, None), "local")
    made.begin("encode")
    return made


def test_on_a_terminal_a_line_takes_the_place_of_the_one_before_and_warnings_stay(
    left: TimeLeft, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    with status_line("[1/5] encode", left) as show:
        show("encode: 50%" + "." * 100)
        show("warning: a file is damaged")
    said = capsys.readouterr()
    assert said.err == "warning: a file is damaged\n"
    assert "\n" not in said.out
    states = said.out.split("\r\x1b[K")
    assert states[1] == "[1/5] encode (about 20 minutes left): starting"
    assert states[2].startswith("[1/5] encode (about 20 minutes left): 50%...")
    assert len(states[2]) == 59  # no line breaks
    assert states[-1] == ""


def test_elsewhere_a_short_stage_says_nothing_meanwhile(left: TimeLeft, capsys: pytest.CaptureFixture[str]) -> None:
    with status_line("[1/5] encode", left) as show:
        show("encode: 50%")
    assert capsys.readouterr().out == ""


def test_time_is_not_said_where_a_later_stage_is_unknown_or_the_own_one_takes_longer(left: TimeLeft) -> None:
    assert left.after() == "; about 18 minutes left"
    left.begun -= 101
    assert left.now() == ""
    left.begin("evaluate")
    assert left.now() == " (about 40 seconds left)"
    del left.expected["report"]
    assert (left.now(), left.after()) == ("", "")


def test_the_time_of_a_training_is_that_of_its_own_log_since_it_began(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(tiny_recipe, train=replace(tiny_recipe.train, total_samples=1024, epochs=None))
    assert training_left(recipe, 60.0) is None
    RunFolder(recipe.folder).log.parent.mkdir(parents=True, exist_ok=True)
    RunFolder(recipe.folder).log.touch()  # begun again after a kill before the first checkpoint
    assert training_left(recipe, 60.0) is None
    append_line(RunFolder(recipe.folder).log, {"samples": 224, "samples_per_second": 4.0})
    assert training_left(recipe, 60.0) == 200.0
    time.sleep(0.05)
    assert training_left(recipe, 0.01) is None  # written by an earlier job
