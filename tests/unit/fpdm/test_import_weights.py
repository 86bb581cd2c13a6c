"""A published checkpoint becomes a run that is sampled like any other."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel

from common.command import exit_status_of
from common.loading import dump_recipe
from common.recipe import Recipe, wanted_samples
from common.run_folder import weights_folder
from fpdm.weights import load_pretrained
from pipeline import import_weights
from tests.conftest import generated, load_samples


@pytest.fixture
def command(tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the command on a file of the tiny run's weights; returns its status."""
    torch.save(load_pretrained(weights_folder(tiny_recipe, 64)).state_dict(), tmp_path / "published.pt")
    (tmp_path / "recipe.yaml").write_text(dump_recipe(tiny_recipe))

    def run(*options: str, checkpoint: Path = tmp_path / "published.pt") -> int:
        arguments = ["--config", str(tmp_path / "recipe.yaml"), "--checkpoint", str(checkpoint), *options]
        monkeypatch.setattr(sys, "argv", ["import_weights.py", *arguments])
        return exit_status_of(import_weights.main)

    return run


def test_imported_weights_draw_the_same_images(command, tiny_recipe: Recipe) -> None:
    imported = replace(tiny_recipe, name="imported")
    assert command("name=imported", "--dry-run") == 0
    assert not imported.folder.exists()
    assert command("name=imported") == 0
    expected, found = (load_samples(generated(recipe, "latest"), 10) for recipe in (tiny_recipe, imported))
    assert all((one == other).all() for one, other in zip(expected, found, strict=True))


def test_a_network_of_diffusers_is_imported_and_sampled_as_any_other(
    command, tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each of its blocks embeds the timestep by itself, which no recipe can say: the weights' folder does."""
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=4, num_embeds_ada_norm=3
    )
    model.save_pretrained(tmp_path / "dit")
    options = ("name=dit", "model.kind=dit", "model.depth=2")
    assert command(*options, checkpoint=tmp_path / "dit") == 0
    assert "computed as diffusers computes it; next: " in capsys.readouterr().out
    recipe = replace(tiny_recipe, name="dit", model=replace(tiny_recipe.model, kind="dit", depth=2))
    imported = load_pretrained(weights_folder(recipe, wanted_samples(recipe.train)))
    assert imported.config.self_conditioned
    images, _ = load_samples(generated(recipe, "latest"), 10)
    assert images.shape == (10, 16, 16, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "has weights already; import into another run"),
        (("name=other", "model.hidden_size=32"), "has hidden_size 16, the recipe makes it 32; change the recipe"),
        (("name=other", "model.num_classes=1"), "has num_classes 3, the recipe makes it 1"),
        (("name=other", "model.kind=dit", "model.depth=2"), "has kind fpdm, the recipe makes it dit"),
    ],
)
def test_misfitting_weights_are_one_line(command, tiny_recipe: Recipe, capsys, options, message) -> None:
    assert command(*options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not replace(tiny_recipe, name="other").folder.exists()


@pytest.mark.parametrize("content", [None, b"hello world\n"])
def test_a_file_that_is_no_checkpoint_is_one_line(command, tmp_path: Path, capsys, content) -> None:
    path = tmp_path / "some.pt"
    if content is not None:
        path.write_bytes(content)
    assert command("name=other", checkpoint=path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --checkpoint: ")
    assert str(path) in line
