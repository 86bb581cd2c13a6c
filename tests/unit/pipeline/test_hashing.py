"""A process hashes no file twice: what a recipe names is resolved once, and passed on."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common import files
from common.recipe import Recipe
from common.stage import Stage
from fpdm import weights
from fpdm.diffusers_folders import WEIGHTS_NAME
from pipeline.evaluation.stage import STAGE as EVALUATE
from pipeline.evaluation.sweep_stage import STAGE as SWEEP
from pipeline.features import extractors
from pipeline.reporting.stage import STAGE as REPORT
from pipeline.sampling.stage import STAGE as SAMPLE
from pipeline.training.stage import STAGE as TRAIN
from preprocess.encoding.stage import STAGE as ENCODE
from tests.conftest import copied
from tests.unit.pipeline.evaluation.test_evaluation import adm_file, sampled  # noqa: F401


@pytest.fixture
def recipe(sampled: Recipe, tmp_path: Path) -> Recipe:  # noqa: F811
    """All that a stage can have to hash: named weights of the extractor, a reference file, two sets of samples."""
    recipe = copied(sampled, tmp_path / "runs")
    (recipe.folder / "metrics.jsonl").write_text(json.dumps({"samples": 64, "step": 1, "loss": 0.5}) + "\n")
    (recipe.folder / "provenance.jsonl").write_text(json.dumps({"stage": "train"}) + "\n")
    named = extractors.find_extractor_weights(recipe.evaluate).path
    reference = adm_file(recipe, tmp_path / "reference.npz", pictures=True)
    return replace(
        recipe,
        sample=replace(recipe.sample, output="features", num_steps=2),
        evaluate=replace(
            recipe.evaluate,
            untrained_baseline=True,
            feature_extractor_weights=str(named),
            reference=str(reference),
        ),
        sweep=replace(recipe.sweep, budgets=(8, 12, 16), iterations=(2,), sampler=("ddim",)),
    )


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was hashed, wherever `sha256_file` is used."""
    counts: Counter[str] = Counter()
    digest = files.hashlib.file_digest

    def counted(file: Any, name: str) -> Any:
        counts[str(Path(file.name).resolve())] += 1
        return digest(file, name)

    monkeypatch.setattr(files.hashlib, "file_digest", counted)
    assert weights.hashlib is files.hashlib
    return counts


def as_command(stage: Stage, recipe: Recipe) -> None:
    resolved = stage.resolve(recipe)
    assert list(stage.plan(resolved))
    stage.work(resolved)
    assert stage.finished(resolved)


def test_a_stage_hashes_a_file_at_most_once(recipe: Recipe, hashed: Counter[str]) -> None:
    for stage, fewest in ((SAMPLE, 4), (EVALUATE, 4), (REPORT, 4)):
        hashed.clear()
        as_command(stage, recipe)
        assert len(hashed) >= fewest, stage.name
        assert {path: count for path, count in hashed.items() if count > 1} == {}, stage.name


def test_encoding_hashes_the_autoencoder_once(
    recipe: Recipe, tmp_path: Path, tiny_vae: Path, hashed: Counter[str]
) -> None:
    new = replace(recipe, data=replace(recipe.data, shards=str(tmp_path / "shards")))
    as_command(ENCODE, new)
    of_the_vae = {path: count for path, count in hashed.items() if tiny_vae.resolve() in Path(path).parents}
    assert set(of_the_vae.values()) == {1}


def test_training_hashes_a_file_at_most_once(recipe: Recipe, tmp_path: Path, hashed: Counter[str]) -> None:
    checkpoint = replace(recipe.train.checkpoint, every_samples=16)
    train = replace(recipe.train, total_samples=32, batch_size=16, checkpoint=checkpoint)
    new = replace(recipe, name="trained", train=train, data=replace(recipe.data, shards=str(tmp_path / "shards")))
    as_command(ENCODE, new)
    hashed.clear()
    as_command(TRAIN, new)
    assert len(hashed) >= 4
    assert {path: count for path, count in hashed.items() if count > 1} == {}


def test_a_sweep_hashes_the_weights_once_a_point_and_all_else_once(recipe: Recipe, hashed: Counter[str]) -> None:
    as_command(SWEEP, recipe)
    (of_points,) = [path for path, count in hashed.items() if count > 1]
    assert Path(of_points).name == WEIGHTS_NAME
    assert hashed[of_points] == 3
    assert len(hashed) >= 4
