"""Checkpoints: what is written, which folders count, what is refused when one is read, and what pruning keeps."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import UserError
from common.files import atomic_folder, sha256_file
from common.loading import parse_recipe
from common.recipe import Recipe, denoiser_config
from common.run_folder import RunFolder
from fpdm.denoiser import build_denoiser
from pipeline.training import checkpoint
from pipeline.training.checkpoint import MARKER, STATE
from pipeline.training.checkpoint_form import Damaged, read
from pipeline.training.state import TrainState
from pipeline.training.throughput import Interval
from pipeline.training.zero import MOMENTS
from tests.seals import edits, flips, resealed


def recipe_in(folder: Path, *overrides: str) -> Recipe:
    network = [f"model.{each}" for each in ("size=null", "hidden_size=8", "num_heads=2", "num_classes=1")]
    training = ("train.batch_size=16", "train.total_samples=160")
    return parse_recipe("name: a", (f"runs={folder}", *training, *network, *overrides))


def tensors_for(recipe: Recipe) -> dict[str, torch.Tensor]:
    names = ("model", f"ema-{recipe.train.ema.decays[0]:g}", *MOMENTS)
    parameters = dict(build_denoiser(denoiser_config(recipe), seed=0).named_parameters())
    return {f"{part}.{name}": value.detach().abs() for part in names for name, value in parameters.items()}


def write(recipe: Recipe, samples_seen: int) -> Path:
    interval = Interval(steps=1, loss=0.5, quartile_counts=(4.0,) * 4)
    state = TrainState(samples_seen, updates=1, interval=interval, recent_losses=(0.5,))
    checkpoint.write(recipe, state, tensors_for(recipe), {"seed": 0}, with_weights=False)
    return RunFolder(recipe.folder).checkpoint(samples_seen)


def names(recipe: Recipe) -> list[int | str]:
    folders = [path.name for path in sorted(RunFolder(recipe.folder).checkpoints.iterdir())]
    return [int(name) if name.isdigit() else name for name in folders]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 7, 500, 999])
def test_a_state_that_is_not_finite_is_not_written(bad: float, place: int, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    tensors = {"model.a": torch.randn(1000, generator=torch.Generator().manual_seed(0)), "model.b": torch.zeros(3)}
    tensors["model.a"][place] = bad
    with pytest.raises(UserError, match=r"model\.a is not finite after 32 samples; nothing is saved of this"):
        checkpoint.write(recipe, TrainState(32), tensors, {}, with_weights=False)
    assert not recipe.folder.exists()


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)  # train.checkpoint.keep is 3
    for samples in range(16, 96, 16):
        write(recipe, samples)
    assert names(recipe) == [48, 64, 80]


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        (range(32, 289, 32), [96, 160, 224, 256, 288]),
        ([32, 64, 80, 96, 128, 240, 256, 272], [80, 240, 256, 272]),  # one after a signal, and some without
    ],
)
def test_the_first_checkpoint_after_every_multiple_is_kept(
    written: Sequence[int], kept: list[int], tmp_path: Path
) -> None:
    recipe = recipe_in(tmp_path, "train.checkpoint.keep=2", "train.checkpoint.keep_every_samples=70")
    for samples in written:
        write(recipe, samples)
    assert names(recipe) == kept


def test_damaged_newer_checkpoints_do_not_push_out_the_one_just_written(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)  # keeps three
    for samples in (16, 64, 80, 96):
        write(recipe, samples)
    for samples in (64, 80, 96):
        (RunFolder(recipe.folder).checkpoint(samples) / MARKER).write_text("{}")
    write(recipe, 32)
    newest = checkpoint.newest_checkpoint(recipe, {"seed": 0})
    assert newest is not None
    assert newest.state.samples_seen == 32


def test_a_folder_without_a_marker_is_no_checkpoint(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    write(recipe, 16)
    with atomic_folder(RunFolder(recipe.folder).checkpoints / "000000000032") as folder:
        (folder / STATE).write_bytes(b"half")
    assert [path.name for path in checkpoint.complete_checkpoints(recipe.folder)] == ["000000000016"]
    newest = checkpoint.newest_checkpoint(recipe, {"seed": 0})
    assert newest is not None
    assert newest.state.samples_seen == 16


def test_a_copy_under_another_name_is_neither_used_nor_deleted(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    for name in ("000000000016.bak", "000000000016 (copy)", "16", "0000000000016", "٠٠٠٠٠٠٠٠٠٠١٦"):
        shutil.copytree(write(recipe, 16), RunFolder(recipe.folder).checkpoints / name)
    for samples in range(16, 96, 16):
        write(recipe, samples)
    assert [path.name for path in checkpoint.complete_checkpoints(recipe.folder)] == [f"{n:012d}" for n in (48, 64, 80)]
    assert len(names(recipe)) == 3 + 5
    shutil.copytree(
        RunFolder(recipe.folder).checkpoints / "000000000080", RunFolder(recipe.folder).checkpoints / "000000000160"
    )
    newest = checkpoint.newest_checkpoint(recipe, {"seed": 0})  # which names the copy and passes it over
    assert newest is not None
    assert newest.folder.name == "000000000080"


def test_a_symbolic_link_to_a_checkpoint_is_read_and_never_deleted(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    elsewhere = shutil.move(write(recipe, 16), tmp_path / "elsewhere")
    (RunFolder(recipe.folder).checkpoints / "000000000016").symlink_to(elsewhere)
    assert checkpoint.newest_checkpoint(recipe, {"seed": 0}) is not None
    for samples in range(32, 112, 16):
        write(recipe, samples)
    assert names(recipe) == [16, 64, 80, 96]
    write(recipe, 16)  # replaces the link, not its target
    assert not (RunFolder(recipe.folder).checkpoints / "000000000016").is_symlink()
    assert (tmp_path / "elsewhere" / MARKER).exists()


@pytest.mark.parametrize("count", [30, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [MARKER, STATE])
def test_a_flipped_bit_is_named_and_the_checkpoint_before_it_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, count: int
) -> None:
    recipe = recipe_in(tmp_path)
    write(recipe, 16)
    path = write(recipe, 32) / name
    for _ in flips(path, np.random.default_rng(0), count):
        newest = checkpoint.newest_checkpoint(recipe, {"seed": 0})
        assert newest is not None
        assert newest.state.samples_seen == 16
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert str(path) in said


def test_an_edited_marker_under_a_new_seal_is_an_error_of_one_line_or_harmless(tmp_path: Path) -> None:
    recipe, random = recipe_in(tmp_path), np.random.default_rng(0)
    path = write(recipe, 32) / MARKER
    marker = json.loads(path.read_text())
    del marker["content_key"]
    refused = 0
    for edited in edits(marker, random, 400):
        resealed(path, lambda _, edited=edited: edited)
        try:
            state, error = read(path.parent, recipe, {"seed": 0}, 32).state, ""
        except UserError as raised:  # damaged, or another run's
            state, error = None, str(raised)
        if state is not None:
            assert state.samples_seen == 32
            assert state.updates in (0, 1)
            assert state.skipped + state.interval.steps + state.interval.skipped <= 6
        else:
            refused += 1
            assert str(path.parent) in error
            assert "\n" not in error
    assert refused > 250


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda tensors: tensors.pop("model.x_embedder.proj.bias"),
            r"tensor 'model\.x_embedder\.proj\.bias' is missing",
        ),
        (lambda tensors: tensors.update(more=torch.zeros(1)), "tensor 'more' is unknown"),
        (
            lambda tensors: tensors.update({"model.x_embedder.proj.bias": torch.zeros(9)}),
            r"float32 of \(9,\), not",
        ),
        (lambda tensors: tensors.update({"model.x_embedder.proj.bias": torch.zeros(8).half()}), "is torch.float16 of"),
        (lambda tensors: tensors["model.x_embedder.proj.bias"].fill_(torch.nan), "is not finite"),
        (lambda tensors: tensors["exp_avg_sq.x_embedder.proj.bias"].fill_(-1), "is negative, and a mean of squares"),
    ],
)
def test_tensors_that_do_not_fit_the_run_are_named_under_a_correct_checksum_too(
    tmp_path: Path, change: Any, reason: str
) -> None:
    recipe = recipe_in(tmp_path)
    folder = write(recipe, 16)
    tensors = load_file(folder / STATE)
    change(tensors)
    save_file(tensors, folder / STATE)
    resealed(folder / MARKER, lambda marker: marker.update(sha256=sha256_file(folder / STATE)))
    with pytest.raises(Damaged, match=reason):
        read(folder, recipe, {"seed": 0})


def test_a_checkpoint_of_another_format_version_is_refused_by_name(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    path = write(recipe, 16) / MARKER
    resealed(path, lambda marker: marker.update(format=2))
    with pytest.raises(Damaged) as raised:
        read(path.parent, recipe, {"seed": 0})
    assert str(raised.value) == f"{path}: format: Input should be 3; found 2; no checkpoint of this version"
    with pytest.raises(UserError, match="all of its 1 checkpoints are damaged or of another version; delete it to st"):
        checkpoint.newest_checkpoint(recipe, {"seed": 0})
