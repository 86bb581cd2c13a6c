"""`pipeline/draw.py` draws the run's own samples, of one class and with other guidance where it is asked."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from common.loading import dump_recipe
from common.recipe import Recipe
from common.run_folder import RunFolder
from pipeline.reporting.contact_sheet import grid
from pipeline.reporting.drawing import draw
from tests.conftest import generated, load_samples


@pytest.fixture
def run(tiny_recipe: Recipe) -> Recipe:
    RunFolder(tiny_recipe.folder).recipe.write_text(dump_recipe(tiny_recipe))
    return tiny_recipe


def drawn(recipe: Recipe, path: Path, name=None, guidance=None, seed=None) -> np.ndarray:
    assert str(path) in draw(recipe.folder, name, guidance, 6, seed, path)
    return np.asarray(Image.open(path))


def test_it_draws_the_runs_own_samples(run: Recipe, tmp_path: Path) -> None:
    images, _ = load_samples(generated(run, "latest"), 10)
    assert np.array_equal(drawn(run, tmp_path / "a.png"), grid(list(images[:6])))


def test_class_guidance_and_seed_change_the_images(run: Recipe, tmp_path: Path) -> None:
    own = drawn(run, tmp_path / "a.png")
    others = [
        drawn(run, tmp_path / "b.png", name="1"),
        drawn(run, tmp_path / "c.webp", name="1", guidance=3.0),
        drawn(run, tmp_path / "d.png", name="1", seed=5),
    ]
    sheets = [own, *others]
    assert len({sheet.shape for sheet in sheets}) == 1
    assert len({sheet.tobytes() for sheet in sheets}) == len(sheets)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "9"}, r"--class: 9; the classes are 0\.\.2"),
        ({"name": "unicorn"}, "--class: no class is named 'unicorn'"),
        ({"guidance": -1.0}, "--guidance: -1; at least 0"),
        ({"guidance": float("nan")}, "--guidance: nan; at least 0"),
        ({"seed": -1}, "--seed: -1 is outside"),
        ({"path": "a.zip"}, r"--out: a\.zip: \.zip; write \.png"),
    ],
)
def test_what_it_cannot_draw_is_one_line(run: Recipe, options: dict, message: str) -> None:
    arguments = {"name": None, "guidance": None, "count": 4, "seed": None, "path": "a.png"} | options
    with pytest.raises(UserError, match=message):
        draw(run.folder, **{**arguments, "path": Path(arguments["path"])})
    assert not Path(arguments["path"]).exists()


def test_guidance_is_refused_where_the_network_never_saw_the_null_label(run: Recipe, tmp_path: Path) -> None:
    unguided = replace(run, train=replace(run.train, label_dropout=0.0))
    RunFolder(run.folder).recipe.write_text(dump_recipe(unguided))
    with pytest.raises(UserError, match=r"--guidance: .*label_dropout"):
        draw(run.folder, None, 2.0, 4, None, tmp_path / "a.png")
