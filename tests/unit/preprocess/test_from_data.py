"""The number of classes and the length in epochs come from the shards; what the recipe states is compared with them."""

from pathlib import Path

import numpy as np
import pytest

from common.errors import NoDataYet, UserError
from common.loading import dump_recipe, parse_recipe
from common.recipe import Recipe, describe_network, wanted_samples
from pipeline.stages import STAGES
from preprocess.from_data import from_data
from preprocess.shards import Sample, write_index, write_shard

TEXT = """
name: own
data: {shards: SHARDS, resolution: 16, flips: false}
vae: {downsampling: 4}
model: {size: null, hidden_size: 16, num_heads: 2}
train: {epochs: 3, batch_size: 4}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return parse_recipe(TEXT.replace("SHARDS", str(tmp_path / "shards")))


def write_shards(recipe: Recipe, count: int, classes: int) -> None:
    folder, moments = Path(recipe.data.shards), np.zeros((8, 4, 4), np.float16)
    folder.mkdir()
    samples = [Sample(number, str(number), number % classes, 16, 16, moments, None) for number in range(count)]
    record = write_shard(folder, 0, samples, {"flips": False})
    write_index(folder, [record], moments.shape, [str(label) for label in range(classes)])


def test_classes_and_epochs_are_those_of_the_shards(recipe: Recipe) -> None:
    write_shards(recipe, count=10, classes=5)
    resolved = from_data(recipe)
    assert (resolved.model.num_classes, resolved.train.total_samples, resolved.train.epochs) == (5, 30, None)
    assert parse_recipe(dump_recipe(resolved)) == resolved == from_data(resolved)
    assert parse_recipe(dump_recipe(recipe)) == recipe


def test_before_there_are_shards_no_later_stage_is_finished_and_a_command_says_what_is_missing(recipe: Recipe) -> None:
    later = [stage for stage in STAGES if stage.name in ("train", "sample", "evaluate", "report")]
    assert not any(stage.is_finished(recipe) for stage in later)
    with pytest.raises(NoDataYet, match=r"model\.num_classes: is left to the data, and .*encode_latents"):
        later[0].resolve(recipe)
    assert "with one class, 16 more with each other" in describe_network(recipe)


def test_what_is_stated_stays_as_it_is_without_any_data(recipe: Recipe) -> None:
    stated = parse_recipe(dump_recipe(recipe), ["model.num_classes=7", "train.epochs=null"])
    assert from_data(stated) == stated
    assert wanted_samples(stated.train) == 204_800_000


def test_guidance_of_a_single_class_is_refused_once_the_data_show_it(recipe: Recipe) -> None:
    write_shards(recipe, count=4, classes=1)
    guided = parse_recipe(dump_recipe(recipe), ["sample.guidance_scale=1.5"])
    with pytest.raises(UserError, match=r"sample\.guidance_scale: 1\.5 with model\.num_classes 1"):
        from_data(guided)


def test_a_length_in_epochs_and_in_samples_is_refused(recipe: Recipe) -> None:
    with pytest.raises(UserError, match=r"train\.epochs: 3 beside train\.total_samples 100: both are the length"):
        parse_recipe(dump_recipe(recipe), ["train.total_samples=100"])
