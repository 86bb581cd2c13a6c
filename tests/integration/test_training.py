"""Training: resuming, refusals, logs, and faults of data, disks and arithmetic."""

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import ROOT, Experiment, environment
from tests.integration.faults import (
    an_older_listing,
    disk_full_at_log_line,
    disk_full_at_save,
    fp16_on_a_cpu,
    loss_spike_at,
    nan_in_sample,
    planted,
    without_wandb,
)
from tests.integration.ranks import run_ranks, started_ranks

TRAIN = "pipeline/train.py"
SAME_TO = 1e-5  # relative, in fp32 with another order of summation
OF_THE_CLOCK = {
    *("samples_per_second", "tflops", "flop_utilisation", "memory_gib"),
    *(f"{part}_seconds" for part in ("step", "data", "forward", "backward", "optimizer", "ema", "exchange")),
    *("previews_seconds", "save_seconds"),
    "content_key",  # which covers the others
}


def metrics(run: Path) -> list[dict[str, Any]]:
    """The log without the fields that depend on the clock."""
    return [{key: value for key, value in line.items() if key not in OF_THE_CLOCK} for line in lines_of(run, "metrics")]


def lines_of(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run)]


def newest_state(run: Path) -> bytes:
    return (max((run / "checkpoints").iterdir()) / "state.safetensors").read_bytes()


def checkpoints(run: Path) -> list[int]:
    return sorted(int(path.parent.name) for path in run.glob("checkpoints/[0-9]*/complete.json"))


@pytest.fixture(scope="module")
def finished_run(experiment: Experiment) -> Path:
    """An uninterrupted run of two ranks."""
    done = run_ranks(experiment, "name=finished", ranks=2)
    assert done.statuses == [0, 0], done.output
    return experiment.folder / "runs/finished"


def test_the_command_trains_under_torchrun_and_prints_its_plan(experiment: Experiment, finished_run: Path) -> None:
    done = experiment.run(TRAIN, "name=torchrun", ranks=2)
    assert done.returncode == 0, done.stderr
    assert "plan: steps: 10 of 16 samples: 2 ranks x 8 x 1 accumulations, ZeRO 2" in done.stdout
    assert "train: 160 of 160 samples" in done.stdout  # no terminal: lines, and no bar
    assert "sample/s]" not in done.stderr
    run = experiment.folder / "runs/torchrun"
    assert metrics(run) == metrics(finished_run)
    assert newest_state(run) == newest_state(finished_run)


def test_a_log_line_has_losses_gradient_norm_and_seconds_by_part(finished_run: Path) -> None:
    line = lines_of(finished_run, "metrics")[-1]
    assert {"loss_q1", "loss_q4", "residual", "gradient_norm", "learning_rate", "no_grad_iterations"} <= set(line)
    assert set(line) >= OF_THE_CLOCK - {"previews_seconds"}  # none were drawn
    parts = sum(line[f"{part}_seconds"] for part in ("data", "forward", "backward", "optimizer"))
    assert 0 < parts <= line["step_seconds"]
    assert line["flop_utilisation"] is None  # there is no peak to compare a CPU with
    assert line["tflops"] > 0
    assert list((finished_run / "tensorboard").iterdir())


def test_a_run_resumes_with_other_ranks_and_another_zero_stage(experiment: Experiment, finished_run: Path) -> None:
    run = interrupted_copy(finished_run, "moved", saved=1)
    done = run_ranks(experiment, "name=moved", "train.zero_stage=3", ranks=4)
    assert done.statuses == [0] * 4, done.output
    assert losses(run) == pytest.approx(losses(finished_run), rel=SAME_TO)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(experiment: Experiment, finished_run: Path) -> None:
    run = interrupted_copy(finished_run, "damaged-checkpoint", saved=2)
    state = max((run / "checkpoints").iterdir()) / "state.safetensors"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    cut = interrupted_copy(finished_run, "cut-marker", saved=2)
    marker = max((cut / "checkpoints").iterdir()) / "complete.json"
    marker.write_text(marker.read_text()[:100])
    for name, damaged in (
        ("damaged-checkpoint", f"{state}: damaged"),
        ("cut-marker", f"{marker}: not readable as JSON"),
    ):
        done = run_ranks(experiment, f"name={name}", ranks=2)
        assert done.statuses == [0, 0], done.output
        assert damaged in done.output
        assert metrics(run.parent / name) == metrics(finished_run)


def test_all_ranks_resume_from_the_checkpoint_that_rank_0_sees(experiment: Experiment, finished_run: Path) -> None:
    run = interrupted_copy(finished_run, "listed", saved=2)
    done = run_ranks(experiment, "name=listed", ranks=2, before=planted(an_older_listing))
    assert done.statuses == [0, 0], done.output
    assert lines_of(run, "provenance")[-1]["from_samples"] == 144
    assert metrics(run) == metrics(finished_run)


def test_a_run_is_not_resumed_with_another_recipe(experiment: Experiment, finished_run: Path) -> None:
    interrupted_copy(finished_run, "changed", saved=1)
    done = run_ranks(experiment, "name=changed", "train.optimizer.learning_rate=0.5", "model.pre_depth=2")
    assert done.statuses == [2]
    (line,) = done.errors
    assert "model.pre_depth (was 1, is 2), train.optimizer.learning_rate (was 0.001, is 0.5)" in line


def test_resume_from_begins_a_run_which_then_resumes_from_its_own_checkpoints(
    experiment: Experiment, finished_run: Path
) -> None:
    start = min((finished_run / "checkpoints").iterdir())
    settings = ("name=fork", f"train.resume_from={start}")
    done = run_ranks(experiment, *settings, "train.total_samples=128", ranks=2)
    assert done.statuses == [0, 0], done.output
    fork = experiment.folder / "runs/fork"
    done = run_ranks(experiment, *settings, ranks=2)
    assert done.statuses == [0, 0], done.output
    assert [line["from_samples"] for line in lines_of(fork, "provenance")] == [96, 128]
    assert metrics(fork) == metrics(finished_run)[6:]
    assert newest_state(fork) == newest_state(finished_run)
    refused = run_ranks(experiment, "name=nowhere", "train.resume_from=nowhere")
    assert refused.statuses == [2]
    assert refused.errors[0].startswith("error: train.resume_from: nowhere is no checkpoint; give a folder")


def test_sparse_steps_from_initial_weights_do_not_depend_on_ranks_and_interruptions(
    experiment: Experiment, finished_run: Path
) -> None:
    weights = finished_run / "weights/000000000160/0.9"
    settings = ("train.sparse_tokens=0.25", "train.dense_end=0.5", "train.intermediate_loss=0.5")
    settings = (*settings, f"train.initial_weights={weights}")
    done = run_ranks(experiment, "name=sparse", *settings)
    assert done.statuses == [0], done.output
    run = experiment.folder / "runs/sparse"
    tensors = "diffusion_pytorch_model.safetensors"
    assert (run / "weights/000000000000/0.9" / tensors).read_bytes() == (weights / tensors).read_bytes()
    assert any(line["intermediate_loss"] for line in metrics(run))
    again = interrupted_copy(run, "sparse-again", saved=1)  # in the sparse part; the dense begins after 80 samples
    done = run_ranks(experiment, "name=sparse-again", *settings, ranks=2)
    assert done.statuses == [0, 0], done.output
    for name in ("loss", "intermediate_loss"):
        first, second = ([line[name] for line in metrics(each)] for each in (run, again))
        assert [value is None for value in first] == [value is None for value in second]
        assert [v for v in second if v] == pytest.approx([v for v in first if v], rel=SAME_TO)
    interrupted_copy(run, "sparse-other", saved=1)
    other = finished_run / "weights/000000000048/0.9"
    refused = run_ranks(experiment, "name=sparse-other", *settings[:-1], f"train.initial_weights={other}")
    assert refused.statuses == [2]
    assert "belongs to a run with another train.initial_weights (was '" in refused.errors[0]


def test_the_newest_checkpoints_and_every_nth_are_kept(experiment: Experiment) -> None:
    done = run_ranks(
        experiment,
        *("name=kept", "train.checkpoint.every_samples=16", "train.checkpoint.keep=2"),
        "train.checkpoint.keep_every_samples=60",
    )
    assert done.statuses == [0], done.output
    assert checkpoints(experiment.folder / "runs/kept") == [64, 128, 144, 160]


def test_a_finished_run_returns_at_once(experiment: Experiment, finished_run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}
    done = run_ranks(experiment, "name=finished")
    assert done.statuses == [0], done.output
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")} == before


def test_a_run_finished_on_a_gpu_is_finished_on_a_login_node(
    experiment: Experiment, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from common.loading import load_recipe
    from pipeline.training import identity as run_identity
    from pipeline.training.run import finished

    monkeypatch.setattr(run_identity, "precision", lambda recipe: "bf16")  # "auto" on a machine with a GPU
    assert finished(load_recipe(experiment.recipe, ["name=finished"]))
    assert not finished(load_recipe(experiment.recipe, ["name=finished", "train.precision=bf16"]))


def test_a_finished_run_of_another_recipe_is_refused(experiment: Experiment, finished_run: Path) -> None:
    for override, expected in (("seed=9", "seed (was 0, is 9)"), ("train.total_samples=32", "train.total_samples: 32")):
        done = run_ranks(experiment, "name=finished", override)
        assert done.statuses == [2]
        assert expected in done.errors[0]


def test_a_second_training_in_the_same_folder_is_refused(experiment: Experiment) -> None:
    given = ("name=locked", "train.total_samples=1000000")
    with started_ranks(experiment, *given) as running:
        wait_until((experiment.folder / "runs/locked/metrics.jsonl").exists)
        done = run_ranks(experiment, *given)
        assert done.statuses == [2]
        assert f"runs/locked: process {running.processes[0].pid} on " in done.errors[0]


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (2, "bf16")])
def test_a_nan_stops_training_before_the_update_and_names_step_and_sample(
    experiment: Experiment, stage: int, precision: str
) -> None:
    run = experiment.folder / f"runs/nan-{stage}-{precision}"
    settings = (f"name={run.name}", f"train.zero_stage={stage}", f"train.precision={precision}")
    done = run_ranks(experiment, *settings, ranks=2, before=planted(nan_in_sample, 13))
    assert done.statuses == [2, 2]
    (line,) = done.errors
    (event,) = lines_of(run, "events")
    assert line.startswith(f"error: {run}: step {event['step']}: the loss is not finite, through samples 13 of ")
    assert event["sample_ids"] == [13]
    assert len(metrics(run)) == event["step"] - 1
    assert max(checkpoints(run), default=0) < event["samples"]


@pytest.mark.parametrize("stage", [0, 2])
def test_steps_that_are_not_finite_are_skipped_up_to_max_skipped_steps(experiment: Experiment, stage: int) -> None:
    run = experiment.folder / f"runs/skipped-{stage}"
    settings = (f"name={run.name}", f"train.zero_stage={stage}", "train.max_skipped_steps=1")
    fault = planted(nan_in_sample, 13)
    done = run_ranks(experiment, *settings, ranks=2, before=fault)
    assert done.statuses == [0, 0], done.output
    events = lines_of(run, "events")
    assert len(events) == sum(line["skipped_steps"] for line in metrics(run)) >= 2
    assert {tuple(event["sample_ids"]) for event in events} == {(13,)}
    again = experiment.folder / f"runs/skipped-again-{stage}"  # the count of updates is saved and restored
    for total in (80, 160):
        settings = (f"name={again.name}", f"train.zero_stage={stage}", "train.max_skipped_steps=1")
        done = run_ranks(experiment, *settings, f"train.total_samples={total}", ranks=2, before=fault)
        assert done.statuses == [0, 0], done.output
    assert newest_state(again) == newest_state(run)


@pytest.mark.parametrize("stage", [2, 3])
def test_fp16_finds_its_loss_scale_and_goes_on_with_it(experiment: Experiment, stage: int, tmp_path: Path) -> None:
    """On a CPU, which is refused otherwise: the same code as on a GPU, with fp16's rounding and overflow."""
    own = tmp_path / "scale.json"  # far too large, and doubled after every two steps
    own.write_text(json.dumps({"fp16": {"initial_scale_power": 24, "hysteresis": 1, "loss_scale_window": 2}}))
    settings = ("train.precision=fp16", f"train.zero_stage={stage}", f"train.deepspeed_config={own}")
    runs = [experiment.folder / "runs" / f"fp16-{stage}-{name}" for name in ("uninterrupted", "resumed")]
    for run, totals in zip(runs, ((192,), (80, 192)), strict=True):
        for total in totals:
            given = (f"name={run.name}", f"train.total_samples={total}", *settings)
            done = run_ranks(experiment, *given, ranks=2, before=planted(fp16_on_a_cpu))
            assert done.statuses == [0, 0], done.output
    assert 2 <= sum(line["skipped_steps"] for line in metrics(runs[0])) < 10
    assert metrics(runs[1]) == metrics(runs[0])
    assert newest_state(runs[1]) == newest_state(runs[0])
    assert all(line["gradient_norm"] < 1 for line in metrics(runs[0]) if line["loss"] is not None)  # unscaled


def test_a_learning_rate_that_diverges_ends_training_before_anything_is_saved(experiment: Experiment) -> None:
    done = run_ranks(
        experiment, "name=exploded", "train.optimizer.learning_rate=1e30", "train.optimizer.gradient_clipping=0"
    )
    assert done.statuses == [2]
    assert "no single sample; lower train.optimizer.learning_rate from 1e+30" in done.errors[0]
    assert not checkpoints(experiment.folder / "runs/exploded")


def test_a_loss_spike_is_logged_and_training_goes_on(experiment: Experiment) -> None:
    run = experiment.folder / "runs/spike"
    fault = planted(loss_spike_at, 30 * 4)
    done = run_ranks(experiment, "name=spike", "train.batch_size=4", before=fault)
    assert done.statuses == [0], done.output
    (event,) = lines_of(run, "events")
    assert (event["event"], event["step"], event["stream"]) == ("loss spike", 31, [120, 124])
    assert '"loss spike"' in done.output


def test_a_full_disk_during_a_save_leaves_the_checkpoint_before_it(experiment: Experiment, finished_run: Path) -> None:
    run = experiment.folder / "runs/full"
    fault = planted(disk_full_at_save, 2)
    done = run_ranks(experiment, "name=full", ranks=2, before=fault)
    assert done.statuses == [2, 2], done.output
    (line,) = done.errors
    assert re.match(rf"error: {run}/(weights|checkpoints)/000000000096\S*: not written \(", line)
    assert checkpoints(run) == [48]
    assert not list(run.glob("*/.*.tmp"))
    done = run_ranks(experiment, "name=full", ranks=2)
    assert done.statuses == [0, 0], done.output
    assert metrics(run) == metrics(finished_run)
    assert newest_state(run) == newest_state(finished_run)


def test_a_folder_that_cannot_be_written_is_an_error_of_one_line(experiment: Experiment, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir(mode=0o555)
    command = experiment.command(TRAIN, "name=closed", f"runs={runs}")
    if os.geteuid() == 0:  # which ignores permissions unless it drops this capability
        command = ["setpriv", "--bounding-set", "-dac_override", *command]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=240)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {runs}/closed: not written (Permission denied)")
    assert "Traceback" not in done.stderr


def test_a_log_that_cannot_be_written_ends_all_ranks_with_one_line(experiment: Experiment) -> None:
    run, fault = experiment.folder / "runs/full-log", planted(disk_full_at_log_line, 3)
    done = run_ranks(experiment, f"name={run.name}", ranks=2, before=fault)
    assert done.statuses == [2, 2], done.output
    (line,) = done.errors
    assert line.startswith(f"error: {run}/metrics.jsonl: not written (No space left on device)")
    assert [line["samples"] for line in metrics(run)] == [16, 32]


def test_an_error_of_rank_0_at_the_start_ends_all_ranks(experiment: Experiment) -> None:
    done = run_ranks(
        experiment, "name=no-wandb", "train.log.wandb_project=faces", ranks=2, before=planted(without_wandb)
    )
    assert done.statuses == [2, 2], done.output
    assert done.errors[0].startswith("error: train.log.wandb_project: the package wandb is not installed")


def test_a_batch_size_that_is_no_multiple_of_the_ranks_is_refused(experiment: Experiment) -> None:
    done = run_ranks(experiment, "name=odd", "train.batch_size=15", ranks=2)
    assert done.statuses == [2, 2]
    assert done.errors[0].startswith("error: train.batch_size: 15 is not divisible by the 2 ranks; use 14")
    assert not (experiment.folder / "runs/odd").exists()


def test_a_flipped_bit_in_a_shard_stops_training_and_names_the_sample(
    encoded_images: Experiment, experiment: Experiment, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(encoded_images.folder / "shards", shards)
    tar = sorted(shards.glob("*.tar"))[1]
    content = bytearray(tar.read_bytes())
    content[700] ^= 1  # in the first sample's moments: past a tar header and an npy header
    tar.write_bytes(content)
    done = run_ranks(experiment, "name=flipped", f"data.shards={shards}")
    assert done.statuses == [2]
    (line,) = done.errors
    assert f"{tar}: sample 20 (member 0000000020) does not match its checksum" in line


def test_shards_of_another_shape_or_number_of_classes_are_refused(experiment: Experiment) -> None:
    for override, expected in (
        ("data.resolution=64", "data.shards"),
        ("model.num_classes=3", "model.num_classes: found 3"),
        ("data.shards=nowhere", "data.shards: nowhere has no index.json"),
    ):
        done = run_ranks(experiment, "name=other", override)
        assert done.statuses == [2]
        assert expected in done.errors[0]


def test_grids_of_samples_are_drawn_at_their_interval(experiment: Experiment) -> None:
    from PIL import Image

    done = run_ranks(
        experiment,
        *(
            "name=grids",
            "train.total_samples=32",
            "train.previews.grid_every_samples=16",
            "train.previews.grid_images=5",
        ),
        ranks=2,
    )
    assert done.statuses == [0, 0], done.output
    grids = sorted((experiment.folder / "runs/grids/grids").iterdir())
    assert [path.name for path in grids] == ["000000000016.png", "000000000032.png"]
    with Image.open(grids[-1]) as picture:
        assert picture.size == (96, 64)  # three by two pictures of 32 pixels


def test_the_distance_logged_while_training_is_the_one_that_evaluation_measures(experiment: Experiment) -> None:
    settings = ("name=distances", "train.total_samples=64", "train.log.every_samples=64")
    done = run_ranks(
        experiment, *settings, "train.previews.distance_every_samples=32", "train.previews.distance_images=12", ranks=2
    )
    assert done.statuses == [0, 0], done.output
    run = experiment.folder / "runs/distances"
    lines = metrics(run)
    assert [line["samples"] for line in lines] == [32, 64]
    assert {line["distance_name"] for line in lines} == {"FD (EfficientNet-Lite0) of 12 samples"}
    for script in ("pipeline/sample.py", "pipeline/eval_fid.py"):
        done = experiment.run(script, *settings)
        assert done.returncode == 0, done.stderr
    measured = json.loads((run / "metrics.json").read_text())["distances"]
    assert lines[-1]["distance"] == pytest.approx(measured["trained"], rel=1e-3)


def test_models_and_references_of_previews_are_checked_before_the_first_step(experiment: Experiment) -> None:
    missing = (
        ("train.previews.grid_every_samples=32", "vae.path=./nowhere", "vae.path: no folder ./nowhere"),
        (
            "train.previews.distance_every_samples=32",
            "evaluate.reference=nowhere",
            "evaluate.reference: nowhere is neither",
        ),
    )
    for preview, override, expected in missing:
        done = run_ranks(experiment, "name=unprepared", preview, override, ranks=2)
        assert done.statuses == [2, 2], done.output
        assert done.errors[0].startswith(f"error: {expected}")
    assert not (experiment.folder / "runs/unprepared/metrics.jsonl").exists()  # no step was done


def test_a_reconstructed_ema_is_near_the_trained_one(experiment: Experiment) -> None:
    from safetensors.torch import load_file

    run = experiment.folder / "runs/widths"
    settings = ("name=widths", "train.checkpoint.every_samples=16")
    done = run_ranks(experiment, *settings, "train.ema.decays=[]", "train.ema.widths=[0.05,0.1,0.08]")
    assert done.statuses == [0], done.output
    file = "diffusion_pytorch_model.safetensors"
    trained, other = (load_file(run / f"weights/000000000160/power-{width}/{file}") for width in ("0.08", "0.1"))
    shutil.rmtree(run / "weights/000000000160/power-0.08")
    script = "pipeline/reconstruct_ema.py"
    done = experiment.run(script, "name=widths", "train.ema.widths=[0.05,0.1]", "--width", "0.08")
    assert done.returncode == 0, done.stderr
    reconstructed = load_file(run / f"weights/000000000160/power-0.08/{file}")
    distance = sum(float((reconstructed[name] - trained[name]).square().sum()) for name in trained)
    apart = sum(float((other[name] - trained[name]).square().sum()) for name in trained)
    assert distance < 0.05 * apart  # ten steps are a coarse curve
    refused = experiment.run(script, "name=widths", "train.ema.widths=[0.05]", "--width", "0.5")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("error: --width: 0.5 is outside (0, 0.28)")


def interrupted_copy(run: Path, name: str, saved: int) -> Path:
    """A copy of a finished run as it was just after its checkpoint number `saved`."""
    copy = run.parent / name
    shutil.copytree(run, copy)
    for checkpoint in sorted((copy / "checkpoints").iterdir())[saved:]:
        shutil.rmtree(checkpoint)
        shutil.rmtree(copy / "weights" / checkpoint.name)
    return copy


def wait_until(condition: Any, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
