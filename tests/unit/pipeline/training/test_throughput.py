"""Logs: sums over ranks and micro-batches, loss spikes, operations of a step, log files, progress on a terminal."""

import json
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.errors import UserError
from common.loading import parse_recipe
from common.log_lines import read_log
from common.recipe import denoiser_config
from pipeline.training.background_writer import BackgroundWriter
from pipeline.training.guards import FEWEST, loss_spike
from pipeline.training.log import ProgressBar, TrainingLog
from pipeline.training.state import TrainState
from pipeline.training.throughput import Interval, loss_sums, step_flops

SMALL = ("model.size=null", "model.hidden_size=32", "model.num_heads=2", "train.batch_size=16")


def test_loss_sums_of_parts_add_up_to_those_of_the_batch() -> None:
    losses, timesteps = torch.rand(16, generator=torch.Generator().manual_seed(0)), torch.arange(16) * 62
    sums = loss_sums(losses, timesteps, 1000)
    parts = sum(loss_sums(losses[part : part + 4], timesteps[part : part + 4], 1000) for part in range(0, 16, 4))
    assert torch.allclose(sums, parts, rtol=1e-12)
    assert sums[0] == pytest.approx(float(losses.sum()))
    quartile = timesteps // 250
    for number in range(4):
        assert sums[1 + number] == pytest.approx(float(losses[quartile == number].sum()))
        assert sums[5 + number] == (quartile == number).sum()


def test_an_interval_saved_in_a_checkpoint_gives_the_same_means() -> None:
    sums = [[3.0, 1.0, 2.0, 0.0, 0.0, 2.0, 2.0, 0.0, 0.0], [5.0, 0.0, 0.0, 4.0, 1.0, 0.0, 0.0, 3.0, 1.0]]
    uninterrupted = Interval().plus(sums[0], 4).plus(sums[1], 4)
    saved = json.loads(json.dumps(TrainState(interval=Interval().plus(sums[0], 4)).to_json()))
    assert TrainState.from_json(4, saved).interval.plus(sums[1], 4) == uninterrupted
    assert uninterrupted.means() == {
        **{"loss": 1.0, "loss_q1": 0.5, "loss_q2": 1.0, "loss_q3": 4 / 3, "loss_q4": 1.0, "skipped_steps": 0}
    }
    assert Interval().means()["loss_q1"] is None


def test_a_loss_spike_lies_far_above_the_recent_losses() -> None:
    recent = [1.0 + 0.01 * (step % 5) for step in range(FEWEST)]
    assert loss_spike(recent[1:], 100.0, 8.0) is None  # too few to compare with
    assert loss_spike(recent, 1.05, 8.0) is None
    assert loss_spike(recent, 0.2, 8.0) is None  # far below
    assert (loss_spike(recent, 1.5, 8.0) or 0) > 8
    assert loss_spike(recent, 1e9, None) is None


def test_the_operations_of_a_step_grow_with_its_iterations() -> None:
    config = denoiser_config(parse_recipe("name: a", SMALL))
    one, two, more = (step_flops(config, counts) for counts in ((0, 1), (0, 2), (3, 1)))
    iteration = (two - one) / 3
    assert more == one + 3 * iteration
    tokens, width, hidden = 256, 32, 128
    block = 2 * tokens * width * (4 * width + 2 * hidden) + 4 * tokens**2 * width
    projections = 2 * tokens * (width * 2 * width + 2 * width * width)
    assert iteration == pytest.approx(block + projections, rel=0.01)


def test_an_error_of_the_background_writer_is_raised_by_the_next_call_once() -> None:
    go = threading.Event()

    def fail() -> None:
        go.wait(10)
        raise UserError("disk: full")

    writer = BackgroundWriter()
    writer.start(fail)
    writer.check()  # the job has not failed yet
    go.set()
    with pytest.raises(UserError, match="disk: full"):
        writer.wait()
    writer.check()


def test_leaving_the_background_writer_waits_for_its_job() -> None:
    done = []

    def write() -> None:
        time.sleep(0.1)
        done.append("written")

    def interrupted() -> None:
        with BackgroundWriter() as writer:
            writer.start(write)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == ["written"]


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
