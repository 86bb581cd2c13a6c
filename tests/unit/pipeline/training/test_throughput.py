"""What is logged adds up over ranks and micro-batches, and what is out of the ordinary is noticed."""

import json
import sys
import threading
import time
from dataclasses import asdict
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
from pipeline.training.guards import FEWEST, SpikeDetector
from pipeline.training.log import Progress, TrainingLog
from pipeline.training.throughput import Interval, loss_sums, step_flops

SMALL = ("model.size=null", "model.hidden_size=32", "model.num_heads=2", "train.batch_size=16")


def test_loss_sums_of_parts_add_up_to_those_of_the_batch() -> None:
    losses, timesteps = torch.rand(16, generator=torch.Generator().manual_seed(0)), torch.arange(16) * 62
    whole = loss_sums(losses, timesteps, 1000)
    parts = sum(loss_sums(losses[part : part + 4], timesteps[part : part + 4], 1000) for part in range(0, 16, 4))
    assert torch.allclose(whole, parts, rtol=1e-12)
    assert whole[0] == pytest.approx(float(losses.sum()))
    quartile = timesteps // 250
    for number in range(4):
        assert whole[1 + number] == pytest.approx(float(losses[quartile == number].sum()))
        assert whole[5 + number] == (quartile == number).sum()


def test_an_interval_carried_over_a_checkpoint_gives_the_same_means() -> None:
    sums = [[3.0, 1.0, 2.0, 0.0, 0.0, 2.0, 2.0, 0.0, 0.0], [5.0, 0.0, 0.0, 4.0, 1.0, 0.0, 0.0, 3.0, 1.0]]
    whole = Interval()
    for one in sums:
        whole.add(one, 4)
    carried = Interval()
    carried.add(sums[0], 4)
    carried = Interval(**json.loads(json.dumps(asdict(carried))))
    carried.add(sums[1], 4)
    assert carried.means() == whole.means()
    assert whole.means() == {
        **{"loss": 1.0, "loss_q1": 0.5, "loss_q2": 1.0, "loss_q3": 4 / 3, "loss_q4": 1.0, "skipped_steps": 0}
    }
    assert Interval().means()["loss_q1"] is None


def test_a_spike_is_what_lies_far_above_the_last_losses() -> None:
    detector = SpikeDetector(8.0, [])
    assert detector.check(100.0) is None  # nothing is usual yet
    detector = SpikeDetector(8.0, [1.0 + 0.01 * (step % 5) for step in range(FEWEST)])
    assert detector.check(1.05) is None
    assert detector.check(0.2) is None  # a loss that falls is none
    assert SpikeDetector(8.0, [1.0 + 0.01 * (step % 5) for step in range(FEWEST)]).check(1.5) > 8
    assert SpikeDetector(None, [1.0] * FEWEST).check(1e9) is None


def test_the_operations_of_a_step_are_those_of_its_iterations() -> None:
    config = denoiser_config(parse_recipe("name: a", SMALL))
    one, two, more = (step_flops(config, counts) for counts in ((0, 1), (0, 2), (3, 1)))
    iteration = (two - one) / 3
    assert more == one + 3 * iteration
    tokens, width, hidden = 256, 32, 128
    block = 2 * tokens * width * (4 * width + 2 * hidden) + 4 * tokens**2 * width
    projections = 2 * tokens * (width * 2 * width + 2 * width * width)
    assert iteration == pytest.approx(block + projections, rel=0.01)


def test_a_writer_works_beside_and_its_error_comes_out_of_the_next_call() -> None:
    go = threading.Event()

    def fail() -> None:
        go.wait(10)
        raise UserError("disk: full")

    writer = BackgroundWriter()
    writer.start(fail)
    writer.check()  # still at work, nothing to tell
    go.set()
    with pytest.raises(UserError, match="disk: full"):
        writer.wait()
    writer.check()  # told once


def test_leaving_waits_for_the_writing_in_hand() -> None:
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


def test_lines_after_the_checkpoint_are_taken_back(tmp_path: Path) -> None:
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


def test_lines_that_are_none_are_taken_back_too_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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


def test_weights_and_biases_gets_one_run_however_often_it_is_queued(
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


def test_weights_and_biases_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    overrides = (*SMALL, f"runs={tmp_path}", "train.log.tensorboard=false", "train.log.wandb_project=faces")
    with pytest.raises(UserError, match=r"train\.log\.wandb_project: the package wandb is not installed"):
        TrainingLog(parse_recipe("name: a", overrides), 0, {})


def test_a_log_file_gets_lines_and_a_terminal_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = {"samples": 16, "loss": 0.5, "samples_per_second": 4.0}
    for rank, watched in ((0, False), (1, False), (0, True)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda watched=watched: watched)
        progress = Progress(64, 0, rank)
        progress.advance(16)
        progress.show(shown)
        progress.close()
        out, err = capsys.readouterr()
        assert (out != "") == (rank == 0 and not watched)
        assert ("16/64" in err) == watched
        if out:
            assert out == "train: 16 of 64 samples, loss 0.5000, 4.0 samples/s, 00:12 left\n"
