"""Latents are compared with the images they were made of: by eye, and by encoding them again."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from common.loading import dump_recipe
from common.recipe import VAE, Data, Model, Recipe
from preprocess import show_latents, verify_shards
from preprocess.encoding.encoding import resolve
from preprocess.encoding.reencode_check import deep_faults, psnr
from preprocess.shards import LatentShards, Sample, write_index, write_shard
from tests.encoding_stage import encode
from tests.photographs import photographs, write_folder

COUNT = 6
ASSETS = Path(__file__).parents[4] / "assets/vae-demo"


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    images = {f"{number % 2}/{number}.png": data for number, data in enumerate(photographs(COUNT, "png", (128, 96)))}
    data = Data(images=str(write_folder(tmp_path / "images", images)), shards=str(tmp_path / "shards"), resolution=64)
    return Recipe(name="test", data=data, vae=VAE(path=str(ASSETS), downsampling=4), model=Model(num_classes=2))


def run(module: object, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    return module.main()  # type: ignore[attr-defined]


def test_a_sheet_shows_images_beside_their_decoded_latents(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encode(recipe)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    run(show_latents, monkeypatch, "--config", str(tmp_path / "recipe.yaml"), "--count", "4")
    assert "4 images, PSNR " in capsys.readouterr().out
    sheet = np.asarray(Image.open(tmp_path / "shards/latents.png")).astype(float)
    # The first two pairs, twice their size. The demo's autoencoder knows no photographs, and decodes them poorly.
    originals = [sheet[8:136, left : left + 128] for left in (8, 272)]
    decoded = [sheet[8:136, left : left + 128] for left in (136, 400)]
    alike = np.corrcoef([image.ravel() for image in (*originals, *decoded)])[:2, 2:]
    assert (alike.diagonal() < 0.9999).all()  # not the same pixels
    assert (alike.diagonal() > 0.5).all()
    assert (alike.diagonal() > alike[[0, 1], [1, 0]] + 0.2).all()  # and of one image, not of another


def test_psnr_is_that_of_the_definition() -> None:
    black, grey = np.zeros((2, 2), np.uint8), np.full((2, 2), 51, np.uint8)
    assert psnr(black, grey) == pytest.approx(20 * np.log10(5))
    assert psnr(grey, grey) == float("inf")


def test_deep_verification_passes_intact_shards(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encode(recipe)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert not run(verify_shards, monkeypatch, recipe.data.shards, "--deep", str(tmp_path / "recipe.yaml"))
    assert "without differences" in capsys.readouterr().out


def test_deep_verification_names_latents_of_another_image_and_wrong_labels(recipe: Recipe, tmp_path: Path) -> None:
    """Shards that are whole in themselves, and wrong: two images exchanged, and one label."""
    encode(recipe)
    shards, encoding = LatentShards(recipe.data.shards), resolve(recipe, download=False)
    moments, flipped = (shards.gather(np.arange(COUNT), np.full(COUNT, flip)) for flip in (False, True))
    moments[[0, 1]] = moments[[1, 0]]
    labels = [1 - shards.labels[3] if number == 3 else shards.labels[number] for number in range(COUNT)]
    samples = [
        Sample(number, encoding.source.entries[number].key, int(labels[number]), 9, 9, moments[number], flipped[number])
        for number in range(COUNT)
    ]
    record = write_shard(tmp_path / "wrong", 0, samples, shards.index["settings"])
    write_index(tmp_path / "wrong", [record], shards.shape, shards.class_names)
    faults = list(deep_faults(recipe, str(tmp_path / "wrong"), COUNT))
    keys = [encoding.source.entries[number].key for number in (0, 1, 3)]
    tar = f"{tmp_path}/wrong/latents-000000.tar: "  # the name of a folder may have spaces
    assert [fault.removeprefix(tar).partition(":")[0] for fault in faults] == keys
    assert ["latents differ" in fault for fault in faults] == [True, True, False]
    assert "label 0, but 1 in the source" in faults[2]


def test_deep_verification_refuses_other_images_than_were_encoded(recipe: Recipe) -> None:
    encode(recipe)
    (Path(recipe.data.images) / "0/0.png").unlink()
    with pytest.raises(UserError, match="made with another source_fingerprint"):
        list(deep_faults(replace(recipe), recipe.data.shards, 4))
