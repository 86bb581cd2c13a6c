"""However a stage is launched, its artefacts are the same, byte for byte."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.loading import parse_recipe
from common.recipe import VAE, Data, Model, Recipe
from common.run_folder import RunFolder
from common.stage_jobs import steps
from common.stage_times import ORDER, read_times
from pipeline.evaluation.sweep_stage import STAGE as SWEEP
from pipeline.stages import STAGES
from tests.conftest import copied, run_stage
from tests.json_files import read_json

PARTS = 2
LAUNCHES = {
    "command": lambda recipe, name: whole(recipe, name),
    "run.py on this machine": lambda recipe, name: in_steps(recipe, name, 1),
    "a chain's jobs": lambda recipe, name: in_steps(recipe, name, PARTS),
}
Launch = Callable[[Recipe, str], None]


def whole(recipe: Recipe, name: str) -> None:
    run_stage(next(stage for stage in STAGES if stage.name == name), recipe)


def in_steps(recipe: Recipe, name: str, parts: int) -> None:
    """The jobs of a stage's steps one after another, the last part first: their order is nobody's promise."""
    stage = next(stage for stage in STAGES if stage.name == name)
    planned = steps(recipe, stage, "slurm", parts)
    assert max(len(step.jobs) for step in planned) == parts
    for step in planned:
        for job in reversed(step.jobs):
            function = getattr(importlib.import_module(job.module), job.function)
            function(parse_recipe(job.recipe), **job.arguments)
    assert stage.is_finished(recipe)
    assert list(read_times(RunFolder(recipe.folder))) == [name]


def contents(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    return {str(path.relative_to(folder)): path.read_bytes() for path in found if not path.name.startswith(".")}


def test_the_stages_of_a_run_are_those_of_its_times() -> None:
    assert tuple(stage.name for stage in STAGES) == ORDER


def test_a_job_imports_every_function_of_a_stage() -> None:
    recipe = Recipe(name="a")
    for stage in (*STAGES, SWEEP):
        for step in steps(recipe, stage, "slurm", 2):
            for name in (step.jobs[0].arguments["resolve"], step.jobs[0].arguments["call"]):
                module, _, function = name.partition(":")
                assert callable(getattr(importlib.import_module(module), function)), name


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(11):
        (folder / str(number % 2)).mkdir(exist_ok=True)
        image = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / str(number % 2) / f"{number}.png")
    return folder


@pytest.mark.parametrize("form", ["tar", "ffcv"])
def test_encoding_makes_the_same_shards_however_it_is_launched(
    form: str, pictures: Path, tiny_vae: Path, tmp_path: Path
) -> None:
    if form == "ffcv" and find_spec("ffcv") is None:
        pytest.skip("needs ffcv: scripts/setup.sh --ffcv")
    made = []
    for number, launch in enumerate(LAUNCHES.values()):
        data = Data(images=str(pictures), shards=str(tmp_path / f"shards{number}"), resolution=16, shard_samples=3)
        recipe = Recipe(
            name="a",
            runs=str(tmp_path / str(number)),
            data=replace(data, format=form),
            vae=VAE(path=str(tiny_vae), downsampling=4, batch_size=2),
            model=Model(num_classes=2),
        )
        recipe = replace(recipe, launch=replace(recipe.launch, jobs=PARTS))
        launch(recipe, "encode")
        made.append(contents(Path(recipe.data.shards)))
    assert any(name.startswith("ffcv/") for name in made[0]) == (form == "ffcv")
    assert {len(each) for each in made} == {len(made[0])}
    assert all(each == made[0] for each in made)


@pytest.mark.parametrize("output", ["chunks", "features"])
def test_sampling_and_evaluation_give_the_same_numbers_however_they_are_launched(
    output: str, tiny_run: Recipe, pictures: Path, tmp_path: Path
) -> None:
    made, numbers = [], []
    for number, launch in enumerate(LAUNCHES.values()):
        recipe = copied(tiny_run, tmp_path / str(number))
        recipe = replace(
            recipe,
            data=replace(recipe.data, images=str(pictures), held_out=None),
            sample=replace(recipe.sample, output=output) if output == "features" else recipe.sample,
            launch=replace(recipe.launch, jobs=PARTS),
        )
        for name in ("sample", "evaluate"):
            (recipe.folder / "stages.json").unlink(missing_ok=True)
            launch(recipe, name)
        made.append(contents(recipe.folder / "samples"))
        numbers.append([each["numbers"] for each in read_json(recipe.folder / "metrics.json")["measurements"]])
    assert all(each.keys() == made[0].keys() for each in made)
    assert all(each == made[0] for each in made)
    assert numbers[1:] == numbers[:1] * 2
