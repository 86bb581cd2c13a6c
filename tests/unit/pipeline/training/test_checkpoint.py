"""What no checkpoint may hold, what is taken for one, and what pruning leaves."""

import json
import re
import shutil
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
from fpdm.denoiser import build_denoiser
from pipeline.training import checkpoint
from pipeline.training.checkpoint import MARKER, STATE, Found
from pipeline.training.checkpoint_form import read
from pipeline.training.zero import MOMENTS
from tests.seals import edits, flips, resealed

PROGRESS = {
    "updates": 1,
    "skipped": 0,
    "interval": {"steps": 1, "skipped": 0, "loss": 0.5, "quartile_losses": [0.0] * 4, "quartile_counts": [4.0] * 4},
    "recent_losses": [0.5],
    "scaler": {},
}


def recipe_in(folder: Path) -> Recipe:
    network = [f"model.{each}" for each in ("size=null", "hidden_size=8", "num_heads=2", "num_classes=1")]
    return parse_recipe("name: a", (f"runs={folder}", "train.batch_size=16", "train.total_samples=160", *network))


def state_of(recipe: Recipe) -> dict[str, torch.Tensor]:
    names = ("model", f"ema-{recipe.train.ema.decays[0]:g}", *MOMENTS)
    parameters = dict(build_denoiser(denoiser_config(recipe), seed=0).named_parameters())
    return {f"{part}.{name}": value.detach().abs() for part in names for name, value in parameters.items()}


def write(recipe: Recipe, samples_seen: int) -> Path:
    checkpoint.write(recipe, state_of(recipe), samples_seen, {"seed": 0}, PROGRESS, with_weights=False)
    return checkpoint.folder_of(recipe) / f"{samples_seen:012d}"


def names(recipe: Recipe) -> list[int | str]:
    found = [path.name for path in sorted(checkpoint.folder_of(recipe).iterdir())]
    return [int(name) if name.isdigit() else name for name in found]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 7, 500, 999])
def test_nothing_is_written_of_a_state_that_is_not_finite(bad: float, place: int, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    state = {"model.a": torch.randn(1000, generator=torch.Generator().manual_seed(0)), "model.b": torch.zeros(3)}
    state["model.a"][place] = bad
    with pytest.raises(UserError, match=r"model\.a is not finite after 32 samples; nothing is saved of this"):
        checkpoint.write(recipe, state, 32, {}, {}, with_weights=False)
    assert not recipe.folder.exists()


def test_the_newest_are_kept_and_of_the_others_nothing_is_left(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)  # which keeps three
    for samples in range(16, 96, 16):
        write(recipe, samples)
    assert names(recipe) == [48, 64, 80]


def test_a_checkpoint_without_its_marker_is_none(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    write(recipe, 16)
    with atomic_folder(checkpoint.folder_of(recipe) / "000000000032") as folder:
        (folder / STATE).write_bytes(b"half")
    assert [path.name for path in checkpoint.complete_checkpoints(recipe)] == ["000000000016"]
    found = checkpoint.newest_checkpoint(recipe, {"seed": 0})
    assert found is not None
    assert found.samples_seen == 16


def test_a_copy_that_somebody_keeps_is_neither_taken_nor_deleted(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    for name in ("000000000016.bak", "000000000016 (copy)", "16", "0000000000016", "٠٠٠٠٠٠٠٠٠٠١٦"):
        shutil.copytree(write(recipe, 16), checkpoint.folder_of(recipe) / name)
    for samples in range(16, 96, 16):
        write(recipe, samples)
    assert [path.name for path in checkpoint.complete_checkpoints(recipe)] == [f"{n:012d}" for n in (48, 64, 80)]
    assert len(names(recipe)) == 3 + 5
    shutil.copytree(checkpoint.folder_of(recipe) / "000000000080", checkpoint.folder_of(recipe) / "000000000160")
    found = checkpoint.newest_checkpoint(recipe, {"seed": 0})  # under the name of another it is named and passed over
    assert found is not None
    assert found.folder.name == "000000000080"


def test_a_linked_checkpoint_is_read_and_neither_it_nor_what_it_leads_to_is_deleted(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    elsewhere = shutil.move(write(recipe, 16), tmp_path / "elsewhere")
    (checkpoint.folder_of(recipe) / "000000000016").symlink_to(elsewhere)
    assert checkpoint.newest_checkpoint(recipe, {"seed": 0}) is not None
    for samples in range(32, 112, 16):
        write(recipe, samples)
    assert names(recipe) == [16, 64, 80, 96]
    write(recipe, 16)  # is written where the link was
    assert not (checkpoint.folder_of(recipe) / "000000000016").is_symlink()
    assert (tmp_path / "elsewhere" / MARKER).exists()


def test_a_flipped_bit_in_a_checkpoint_is_named_and_the_one_before_it_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, random = recipe_in(tmp_path), np.random.default_rng(0)
    write(recipe, 16)
    for name, count in ((MARKER, 150), (STATE, 30)):
        path = write(recipe, 32) / name
        for _ in flips(path, random, count):
            found = checkpoint.newest_checkpoint(recipe, {"seed": 0})
            assert found is not None
            assert found.samples_seen == 16
            said = capsys.readouterr().err
            assert said.count("\n") == 1
            assert str(path) in said


def test_an_edited_marker_under_a_new_seal_is_one_line_or_the_right_checkpoint(tmp_path: Path) -> None:
    recipe, random = recipe_in(tmp_path), np.random.default_rng(0)
    path = write(recipe, 32) / MARKER
    whole = json.loads(path.read_text())
    del whole["content_key"]
    refused = 0
    for edited in edits(whole, random, 400):
        resealed(path, lambda _, edited=edited: edited)
        try:
            found: Any = read(path.parent, recipe, {"seed": 0}, 32)
        except UserError as error:  # another run's
            found = str(error)
        if isinstance(found, Found):
            assert found.samples_seen == 32
            progress = found.progress
            assert progress["updates"] in (0, 1)
            assert progress["skipped"] + progress["interval"]["steps"] + progress["interval"]["skipped"] <= 6
        else:
            refused += 1
            assert str(path.parent) in found
            assert "\n" not in found
    assert refused > 250


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: state.pop("model.x_embedder.proj.bias"), r"tensor 'model\.x_embedder\.proj\.bias' is missing"),
        (lambda state: state.update(more=torch.zeros(1)), "tensor 'more' is unknown"),
        (
            lambda state: state.update({"model.x_embedder.proj.bias": torch.zeros(9)}),
            r"float32 of \(9,\), not",
        ),
        (lambda state: state.update({"model.x_embedder.proj.bias": torch.zeros(8).half()}), "is torch.float16 of"),
        (lambda state: state["model.x_embedder.proj.bias"].fill_(torch.nan), "is not finite"),
        (lambda state: state["exp_avg_sq.x_embedder.proj.bias"].fill_(-1), "is negative, and a mean of squares"),
    ],
)
def test_a_state_of_other_tensors_under_its_right_checksum_is_named(tmp_path: Path, change: Any, reason: str) -> None:
    recipe = recipe_in(tmp_path)
    folder = write(recipe, 16)
    state = load_file(folder / STATE)
    change(state)
    save_file(state, folder / STATE)
    resealed(folder / MARKER, lambda marker: marker.update(sha256=sha256_file(folder / STATE)))
    found = read(folder, recipe, {"seed": 0})
    assert isinstance(found, str)
    assert re.search(reason, found)


def test_a_checkpoint_of_another_format_is_named(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    path = write(recipe, 16) / MARKER
    resealed(path, lambda marker: marker.update(format=2))
    found = read(path.parent, recipe, {"seed": 0})
    assert found == f"{path}: format: Input should be 3; found 2; no checkpoint of this version"
    with pytest.raises(UserError, match="none of its 1 checkpoints is whole and of this version; delete it to start"):
        checkpoint.newest_checkpoint(recipe, {"seed": 0})
