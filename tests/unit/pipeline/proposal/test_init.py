"""From a folder of images to a recipe that fits them: every file is accounted for, every line has its reason."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from common.errors import UserError
from common.loading import load_recipe
from common.recipe import Data, Recipe
from pipeline.planning.estimate import Speeds
from pipeline.planning.machine import ROOT, this_machine
from pipeline.proposal import propose as proposing
from pipeline.proposal.choose import DEMO, FROM_DEMO, crop, max_rejected
from pipeline.proposal.look import look
from pipeline.proposal.propose import propose
from pipeline.proposal.recipe_text import Setting, recipe_text
from tests.photographs import idx_bytes


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of cut-out images of many shapes, and one file of each kind that is unusable."""
    draw, folder = np.random.default_rng(0), tmp_path / "my images"
    for number in range(48):
        pixels = np.full((60, 40 + 2 * number, 3), 255, np.uint8)
        pixels[10:50, 10:30] = draw.integers(0, 256, (40, 20, 3))
        path = folder / ("cats" if number % 3 else "dogs") / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    (folder / "cats/cut.png").write_bytes(path.read_bytes()[:200])
    (folder / "cats/page.jpg").write_bytes(b"<!DOCTYPE html><html>")
    (folder / "cats/empty.png").write_bytes(b"")
    (folder / "dogs/avif.jpg").write_bytes(b"\0\0\0\x1cftypavif" + bytes(20))
    (folder / "dogs/phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "dogs/web.avif").write_bytes(b"\0\0\0\x1cftypavif")
    (folder / "notes.txt").write_text("mine")
    return folder


def test_every_file_is_counted_or_named_with_its_reason(images: Path) -> None:
    found = look(Data(images=str(images)))
    assert found.per_class == {"cats": 32, "dogs": 16}
    reasons = dict(found.unusable)
    assert set(reasons) == {"cats/cut.png", "cats/page.jpg", "cats/empty.png", "dogs/avif.jpg"}
    assert "truncated" in reasons["cats/cut.png"]
    assert "HTML" in reasons["cats/page.jpg"]
    assert "AVIF" in reasons["dogs/avif.jpg"]
    assert [(name, "HEIC" in why, "AVIF" in why) for name, why in sorted(found.unsupported)] == [
        ("dogs/phone.heic", True, False),
        ("dogs/web.avif", False, True),
    ]
    assert found.others.total() == 1
    assert crop(found)[0] == "fit"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds as if measured: 50 samples and 20 images a second."""
    speeds = Speeds(training=50.0, encoding=0.02, sampling=0.2, evaluation=0.05)
    monkeypatch.setattr(proposing, "measured", lambda *_: speeds)
    monkeypatch.setattr(proposing, "_autoencoder_rate", lambda *_: 20.0)


@pytest.mark.usefixtures("quick")
def test_the_recipe_says_why_for_every_line_and_fits_the_time(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "recipe.yaml"
    proposed = propose(str(images), out, 600.0, ["sample.num_samples=64", "data.resolution=32"])
    recipe, text = load_recipe(out), out.read_text(encoding="utf-8")
    assert recipe == proposed
    values = [line for line in text.splitlines() if not line.startswith("#") and not line.rstrip().endswith(":")]
    assert all(" # " in line and line.partition(" # ")[2].strip() for line in values)
    assert (recipe.name, recipe.data.crop, recipe.model.num_classes) == ("my-images", "fit", None)
    assert (recipe.data.resolution, recipe.model.patch_size, recipe.sample.num_samples) == (32, 2, 64)
    assert recipe.data.max_rejected >= 4 / 52
    assert recipe.train.epochs is not None
    assert recipe.train.epochs * 48 / 50 < 600
    assert recipe.train.log.every_samples <= 60 * 50
    assert recipe.vae.training is not None  # noise is not what the demo's autoencoder was trained on


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("hours", "own", "wide_speed", "width", "rate"),
    [
        (0.5, [], 50.0, 128, 4e-3),
        (2.0, [], 50.0, 256, 2e-3),
        (2.0, [], 5.0, 128, 4e-3),  # of which, as measured, too few epochs fit
        (2.0, ["model.hidden_size=192"], 50.0, 192, 2e-3),
        (2.0, ["train.epochs=9"], 50.0, 128, 4e-3),
        (2.0, ["model.size=S"], 50.0, None, 2e-3),
    ],
)
def test_where_there_is_time_for_more_than_makes_sense_the_network_is_wider(
    images: Path,
    tmp_path: Path,
    hours: float,
    own: list[str],
    wide_speed: float,
    width: int | None,
    rate: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def speeds(recipe: Recipe, *_: object) -> Speeds:
        training = wide_speed if recipe.model.hidden_size == 256 else 50.0
        return Speeds(training=training, encoding=0.02, sampling=0.2, evaluation=0.05)

    monkeypatch.setattr(proposing, "measured", speeds)
    monkeypatch.setattr(proposing, "this_machine", lambda folder: replace(this_machine(folder), gpus=[]))
    recipe = propose(str(images), tmp_path / "recipe.yaml", 3600 * hours, own)
    assert (recipe.model.hidden_size, recipe.train.optimizer.learning_rate) == (width, rate)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("batch", [32, 64, 128])
def test_the_average_reaches_over_a_tenth_of_the_steps_of_any_batch(images: Path, tmp_path: Path, batch: int) -> None:
    train = propose(str(images), tmp_path / "recipe.yaml", 3600.0, [f"train.batch_size={batch}"]).train
    assert train.epochs
    steps, decay = train.epochs * 48 / batch, train.ema.decays[0] ** (batch / train.ema.reference_batch)
    assert 1 / (1 - decay) == pytest.approx(steps / 10, rel=0.1)


@pytest.mark.usefixtures("quick")
def test_a_recipe_without_an_autoencoder_draws_pixels(images: Path, tmp_path: Path) -> None:
    recipe = propose(str(images), tmp_path / "recipe.yaml", 600.0, ["data.resolution=32", "vae.path=null"])
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert (recipe.vae.path, recipe.vae.latent_channels, recipe.vae.downsampling) == (None, 3, 1)
    assert recipe.model.patch_size == 4


def test_a_recipe_never_refuses_the_images_that_it_was_written_for() -> None:
    for count in range(1, 130):
        for bad in range(count):
            share, _ = max_rejected(bad, count, count)
            assert bad <= share * count < max(bad, 0.001 * count) + 1
    draw = np.random.default_rng(0)  # of a larger set, a part is looked at
    for share_of_bad in (0.0, 0.0002, 0.02, 0.4):
        unusable = draw.random(40_000) < share_of_bad
        for _ in range(50):
            bad = int(unusable[draw.permutation(40_000)[:5000]].sum())
            assert unusable.sum() <= max_rejected(bad, 5000, 40_000)[0] * 40_000


def test_a_recipe_starts_from_the_demos_measured_settings() -> None:
    demo, names = load_recipe(DEMO), yaml.safe_load(DEMO.read_text())
    stated = {f"objective.{name}" for name in names["objective"]} | {
        f"model.{name}" for name in names["model"] if name not in ("num_classes", "depth", "patch_size")
    }
    assert stated <= FROM_DEMO.keys()
    assert isinstance(demo, Recipe)


def test_of_two_settings_of_a_field_the_later_one_counts_and_text_is_quoted() -> None:
    settings = [Setting("a.b", 1, "x"), Setting("c", "yes: # no", "why"), Setting("a.b", [0.9, 0.99], "as you chose")]
    text = recipe_text(settings, "heading")
    assert yaml.safe_load(text) == {"a": {"b": [0.9, 0.99]}, "c": "yes: # no"}
    assert text.startswith("# heading\n")


def test_files_of_mnists_form_are_recognised_by_their_names(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for name, shape in (("images-idx3-ubyte", (6, 28, 28)), ("labels-idx1-ubyte", (6,))):
        (tmp_path / f"train-{name}").write_bytes(idx_bytes(draw.integers(0, 3, shape, np.uint8)))
    for named in (tmp_path, tmp_path / "train-images-idx3-ubyte"):
        found = look(Data(images=str(named)))
        assert (found.data.source, found.usable) == ("idx", 6)


def test_a_folder_without_a_usable_image_and_a_field_without_a_value_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"none of 1 images is usable; 1\.png: empty file"):
        look(Data(images=str(tmp_path / "a")))
    with pytest.raises(UserError, match="'epochs': not a field; write section"):
        propose(str(tmp_path), tmp_path / "r.yaml", 60.0, ["epochs"])


def test_the_command_writes_over_nothing(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("mine")
    command = [sys.executable, str(ROOT / "pipeline/init.py"), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, (tmp_path / "recipe.yaml").read_text()) == (2, "mine")
    assert done.stderr.startswith("error: --out: recipe.yaml is there already")
