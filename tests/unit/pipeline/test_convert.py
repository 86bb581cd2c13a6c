"""The command that converts a DiT, and what training does with its weights."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from common.recipe import Recipe, denoiser_config
from common.run_folder import weights_folder
from fpdm.config import DenoiserConfig
from fpdm.conversion import fpdm_from_dit
from fpdm.denoiser import build_denoiser
from fpdm.weights import load_pretrained
from pipeline import convert
from pipeline.training.checkpoint import export_weights
from pipeline.training.initial import initial_network, sha256_of_weights

PUBLISHED = DenoiserConfig(kind="dit", depth=3, input_size=4, hidden_size=384, num_heads=6, num_classes=3)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch):
    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
        return convert.main()

    return run


@pytest.fixture
def dit_run(tiny_run: Recipe, tmp_path: Path) -> Recipe:
    """A run of a DiT, with weights."""
    recipe = replace(tiny_run, runs=str(tmp_path / "runs"), model=replace(tiny_run.model, kind="dit", depth=4))
    export_weights(recipe, dict(build_denoiser(denoiser_config(recipe), seed=1).named_parameters()), 64)
    return recipe


def beginning_with(recipe: Recipe, folder: Path, **model: object) -> Recipe:
    """The recipe of an FPDM that begins with these weights."""
    settings = {"kind": "fpdm", "pre_post_timestep_conditioning": True, **model}
    return replace(
        recipe,
        model=replace(recipe.model, **settings),
        train=replace(recipe.train, initial_weights=str(folder)),
    )


def test_training_begins_with_the_converted_weights_of_a_run(command, dit_run: Recipe, tmp_path: Path, capsys) -> None:
    source, out = weights_folder(dit_run, 64), tmp_path / "converted"
    assert command(source, "--out", out, "--injection", "decay") == 0
    assert f"train.initial_weights={out} model.kind=fpdm" in capsys.readouterr().out
    begun = initial_network(beginning_with(dit_run, out, injection="decay"))
    expected = fpdm_from_dit(load_pretrained(source), injection="decay").state_dict()
    assert begun.config.kind == "fpdm"
    assert all(torch.equal(tensor, expected[name]) for name, tensor in begun.state_dict().items())
    assert command(source, "--out", out) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_published_file_is_converted(command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"ema": build_denoiser(PUBLISHED, seed=0).state_dict()}, tmp_path / "DiT.pt")
    assert command(tmp_path / "DiT.pt", "--out", tmp_path / "converted", "--pre-depth", 2, "--post-depth", 0) == 0
    config = load_pretrained(tmp_path / "converted").config
    assert (config.pre_depth, config.post_depth, config.injection) == (2, 0, "concat")
    assert command(tmp_path / "DiT.pt", "--out", tmp_path / "other", "--block", 7) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "DiT.pt: block: 7 is not one of the inner blocks, 1 to 1" in line
    assert not (tmp_path / "other").exists()


def test_a_config_of_another_form_is_named(command, dit_run: Recipe, tmp_path: Path, capsys) -> None:
    source = shutil.copytree(weights_folder(dit_run, 64), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({"_class_name": config["_class_name"], "extra": [1]}))
    assert command(source, "--out", tmp_path / "converted") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {source}: ")
    assert not (tmp_path / "converted").exists()


def test_weights_that_do_not_fit_the_recipe_are_refused(command, dit_run: Recipe, tmp_path: Path) -> None:
    assert command(weights_folder(dit_run, 64), "--out", tmp_path / "converted") == 0
    fitting = beginning_with(dit_run, tmp_path / "converted")
    other_objective = replace(fitting.objective, prediction="clean")
    for recipe, message in (
        (beginning_with(dit_run, tmp_path / "converted", hidden_size=32), "has hidden_size 16, the recipe makes it 32"),
        (beginning_with(dit_run, tmp_path / "converted", injection="decay"), "has injection concat"),
        (replace(fitting, objective=other_objective), "trained with objective.prediction v, the recipe has clean"),
        (beginning_with(dit_run, tmp_path / "nowhere"), "nowhere/config.json: No such file"),
    ):
        with pytest.raises(UserError, match=r"train\.initial_weights: ") as refused:
            initial_network(recipe)
        assert message in str(refused.value)
    initial_network(replace(fitting, objective=replace(fitting.objective, loss_weight="min_snr")))


def test_damaged_weights_are_refused(command, dit_run: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "converted"
    assert command(weights_folder(dit_run, 64), "--out", out) == 0
    path = out / "diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    sha256_of_weights(out)  # which config.json states
    with pytest.raises(UserError, match=r"train\.initial_weights: .*changed after it was written"):
        initial_network(beginning_with(dit_run, out))
