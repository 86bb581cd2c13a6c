"""Log files, Weights & Biases, and progress on a terminal."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.errors import UserError
from common.loading import parse_recipe
from common.log_lines import read_log
from pipeline.training.log import ProgressBar, TrainingLog
from pipeline.training.state import TrainState
from pipeline.training.throughput import Interval

SMALL = ("model.size=null", "model.hidden_size=32", "model.num_heads=2", "train.batch_size=16")


def test_log_lines_after_the_checkpoint_are_removed(tmp_path: Path) -> None:
    recipe = parse_recipe("name: a", (*SMALL, f"runs={tmp_path}", "train.log.tensorboard=false"))
    recipe.folder.mkdir()
    path = recipe.folder / "metrics.jsonl"
    path.write_text('{"samples": 16, "loss": 1.0}\n{"samples": 32, "loss": 0.5}\n{"samples": 48, "lo')
    log = TrainingLog(recipe, 16, {})
    log.write({"samples": 32, "loss": 0.25})
    assert read_log(path) == [
        {"samples": 16, "loss": 1.0},
        {"samples": 32, "loss": 0.25},
    ]


def test_damaged_log_lines_are_removed_with_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = parse_recipe("name: a", (*SMALL, f"runs={tmp_path}", "train.log.tensorboard=false"))
    recipe.folder.mkdir()
    path = recipe.folder / "metrics.jsonl"
    bad = (b"\xff", b"7", b"[{", b"[" * 99_999, b'{"samples": "1"}', b'{"samples": NaN}', b'{"samples": -1}', b"")
    path.write_bytes(b"\n".join([b'{"samples": 16}', *bad, b'{"samples": 32}', b'{"samples": 48}', b""]))
    TrainingLog(recipe, 32, {})
    assert read_log(path) == [{"samples": 16}, {"samples": 32}]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"warning: {path}: line 2: not readable as JSON; left out")
    assert said.endswith("(and 7 more)\n")


def test_a_requeued_job_goes_on_in_the_same_weights_and_biases_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    written: list[tuple[dict[str, float], int]] = []

    def init(**settings: Any) -> SimpleNamespace:
        asked.append(settings)
        return SimpleNamespace(log=lambda values, step: written.append((values, step)), finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    overrides = (*SMALL, f"runs={tmp_path}", "train.log.tensorboard=false", "train.log.wandb_project=faces")
    for seed in (0, 0, 1):
        recipe = parse_recipe("name: a", (*overrides, f"seed={seed}"))
        recipe.folder.mkdir(exist_ok=True)
        log = TrainingLog(recipe, 0, {"seed": seed})
        log.write({"samples": 16, "loss": 0.5, "residual": None})
        log.close()
    first, second, other = asked
    assert first["id"] == second["id"] != other["id"]
    assert (first["project"], first["resume"]) == ("faces", "allow")
    assert written[0] == ({"train/samples": 16, "train/loss": 0.5}, 16)


def test_weights_and_biases_that_is_not_installed_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    overrides = (*SMALL, f"runs={tmp_path}", "train.log.tensorboard=false", "train.log.wandb_project=faces")
    with pytest.raises(UserError, match=r"train\.log\.wandb_project: the package wandb is not installed"):
        TrainingLog(parse_recipe("name: a", overrides), 0, {})


def test_progress_is_a_bar_on_a_terminal_and_lines_in_a_log_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = TrainState(samples_seen=16, interval=Interval(steps=1, loss=0.5))
    for rank, watched in ((0, False), (1, False), (0, True)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda watched=watched: watched)
        progress = ProgressBar(64, 0, rank)
        progress.advance(16)
        progress.show(state, {"samples_per_second": 4.0})
        progress.close()
        out, err = capsys.readouterr()
        assert (out != "") == (rank == 0 and not watched)
        assert ("16/64" in err) == watched
        if out:
            assert out == "train: 16 of 64 samples, loss 0.5000, 4.0 samples/s, 00:12 left\n"


def test_the_time_left_is_that_of_the_limit_that_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    progress = ProgressBar(64, 0, 0, seconds=10.0)
    state = TrainState(samples_seen=16, seconds=7.0, interval=Interval(steps=1, loss=0.5))
    progress.show(state, {"samples_per_second": 4.0})
    assert capsys.readouterr().out.endswith("00:03 left\n")
