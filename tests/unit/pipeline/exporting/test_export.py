"""What an export shows of its run, and how it is shared."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import yaml
from PIL import Image

from common.errors import UserError
from common.recipe import Recipe
from common.run_folder import RunFolder
from common.sealed import write_sealed
from fpdm import SamplerSettings, Way
from fpdm.pipeline_hf import FPDMPipeline
from pipeline import export as command
from pipeline.exporting import push
from pipeline.exporting.export import export
from pipeline.exporting.model_card import Licences
from pipeline.sampling.sample_set import sample_set
from preprocess.shards import INDEX
from tests.conftest import generated, load_samples


def test_the_card_says_what_it_is_how_to_use_it_and_under_what_licence(tiny_recipe: Recipe) -> None:
    images, _ = load_samples(generated(tiny_recipe, "latest"), 10)
    export(tiny_recipe, Licences("cc-by-4.0", "drawn by a program, CC0"), "me/tiny")
    folder = RunFolder(tiny_recipe.folder).pipeline
    card = (folder / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert (head["license"], head["library_name"]) == ("cc-by-4.0", "diffusers")
    for said in (
        'DiffusionPipeline.from_pretrained("me/tiny", trust_remote_code=True)',
        "drawn by a program, CC0",
        "3 classes",
        "12 evaluations of a transformer block",
        "64 images seen",
        "Not measured",
    ):
        assert said in card, said
    assert "{{" not in card
    assert all(len(line) < 200 for line in card.splitlines())
    sheet = np.asarray(Image.open(folder / "samples.png"))  # of 16 pixels enlarged 8 times
    assert np.array_equal(sheet[: 16 * 8 : 8, : 16 * 8 : 8], images[0])
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["name"] == "tiny"


def test_without_drawn_samples_the_pipeline_draws_those_of_the_card(tiny_recipe: Recipe) -> None:
    sheet = RunFolder(tiny_recipe.folder).pipeline / "samples.png"
    export(tiny_recipe)
    drawn = np.asarray(Image.open(sheet)).astype(int)
    generated(tiny_recipe, "latest")
    export(tiny_recipe)
    assert np.abs(np.asarray(Image.open(sheet)) - drawn).max() <= 1  # in other batches


def test_an_export_draws_by_the_plan_of_its_samples(tiny_recipe: Recipe) -> None:
    settings = replace(tiny_recipe.sample, sampler="ddim", allocation="calibrated")
    recipe = replace(tiny_recipe, sample=settings)
    chosen = Way(
        sampler="multistep",
        sampler_settings=SamplerSettings(spacing="trailing", spacing_power=1.6, order=3),
        num_steps=4,
        iterations=(2, 0, 1, 1),
        reuse=True,
        start_extrapolation=0.5,
    )
    folder = sample_set(recipe, "latest").folder
    folder.mkdir(parents=True)
    write_sealed(folder / "plan.json", asdict(chosen))
    images, labels = load_samples(generated(recipe, "latest"), 10)
    export(recipe)
    pipeline = FPDMPipeline.from_pretrained(RunFolder(recipe.folder).pipeline)
    found = np.stack([np.asarray(image) for image in pipeline(labels.tolist(), seed=recipe.seed).images])
    assert np.abs(found.astype(int) - images).max() <= 1


def test_classes_have_the_names_of_the_training_shards(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / INDEX).touch()
    recipe = replace(tiny_recipe, data=replace(tiny_recipe.data, shards=str(tmp_path)))
    index: dict[str, Any] = {"class_names": ["cat", "dog", "a | b"], "settings": {}}
    for module in ("preprocess.from_data", "pipeline.sampling.sample_set"):
        monkeypatch.setattr(f"{module}.read_local_index", lambda _: index)
    export(recipe)
    folder = RunFolder(recipe.folder).pipeline
    assert json.loads((folder / "model_index.json").read_text())["id2label"] == {"0": "cat", "1": "dog", "2": "a | b"}
    card = (folder / "README.md").read_text()
    assert "3 classes (cat; dog; a | b)" in card
    assert 'pipeline(["cat", "dog"])' in card


class Hub:
    """huggingface_hub.HfApi, of which nothing leaves this process."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.fault, self.calls = fault, []

    def __call__(self) -> "Hub":
        return self

    def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> None:
        self.calls.append(("create", repository, private, exist_ok))
        if self.fault:
            raise self.fault

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> Any:
        self.calls.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")


FILES = [
    "README.md",
    "model_index.json",
    "pipeline.py",
    "recipe.yaml",
    "samples.png",
    "scheduler",
    "transformer",
    "vae",
]


def test_push_uploads_the_whole_export_in_one_commit(
    tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from common.loading import dump_recipe

    (tmp_path / "recipe.yaml").write_text(dump_recipe(tiny_recipe))
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    command.main(["--config", str(tmp_path / "recipe.yaml"), "--push", "me/tiny", "--private"])
    assert hub.calls == [("create", "me/tiny", True, True), ("upload", "me/tiny", FILES)]
    said = capsys.readouterr().out
    assert "plan: upload: https://huggingface.co/me/tiny" in said
    assert said.endswith("uploaded: https://huggingface.co/me/tiny/commit/1\n")


def test_a_refusal_of_the_hub_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = Hub(OSError("401 Client Error.\nInvalid username or password"))
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    with pytest.raises(UserError, match=r"--push: me/tiny: 401 .*Invalid username.* hf auth login") as error:
        push.push(tmp_path, "me/tiny")
    assert "\n" not in str(error.value)
    assert len(hub.calls) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--push", "tiny"], "--push: 'tiny' is no USER/REPO"),
        (["--push", "../x/y"], "--push: "),
        (["--private"], "--private: goes with --push"),
        (["--license", "mine: all"], "--license: 'mine: all'"),
    ],
)
def test_arguments_that_the_hub_would_refuse_are_refused_first(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        command.main(["--config", "nowhere.yaml", *arguments])
