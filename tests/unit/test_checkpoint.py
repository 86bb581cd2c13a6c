"""What no checkpoint may hold, and what pruning leaves."""

from pathlib import Path

import pytest
import torch

from common.errors import UserError
from common.files import atomic_folder
from common.loading import parse_recipe
from common.recipe import Recipe
from pipeline import checkpoint


def recipe_in(folder: Path) -> Recipe:
    return parse_recipe("name: a", (f"runs={folder}", "train.batch_size=16", "train.total_samples=160"))


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
        checkpoint.write(recipe, {"model.a": torch.ones(3)}, samples, {}, {}, with_weights=False)
    assert [path.name for path in sorted(checkpoint.folder_of(recipe).iterdir())] == [
        "000000000048",
        "000000000064",
        "000000000080",
    ]


def test_a_checkpoint_without_its_marker_is_none(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    checkpoint.write(recipe, {"model.a": torch.ones(3)}, 16, {}, {}, with_weights=False)
    with atomic_folder(checkpoint.folder_of(recipe) / "000000000032") as folder:
        (folder / checkpoint.STATE).write_bytes(b"half")
    assert [path.name for path in checkpoint.complete_checkpoints(recipe)] == ["000000000016"]
    found = checkpoint.newest_checkpoint(recipe, {})
    assert found is not None
    assert found.samples_seen == 16
