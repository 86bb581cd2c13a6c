"""The demo's portraits are a function of (seed, class, index), and no combination is in both parts."""

import hashlib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from common.recipe import Data, DemoImages, Recipe
from preprocess.demo import portraits
from preprocess.demo.portraits import (
    CLASSES,
    MARKER,
    Portraits,
    compose,
    finished,
    held_out_combinations,
    load_portraits,
    plan,
    training_combinations,
)

pytest.importorskip("robohash")


@pytest.fixture(scope="module")
def monsters() -> Portraits:
    return load_portraits("monster", 32)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Monsters alone, which load in a moment."""
    monkeypatch.setattr(portraits, "CLASSES", {"monster": "set2"})
    return Recipe(
        name="test",
        demo=DemoImages(per_class=6, held_out_per_class=3),
        data=Data(images=str(tmp_path / "images"), held_out=str(tmp_path / "held-out"), resolution=32),
    )


def digests(folder: str) -> dict[str, str]:
    files = sorted(path for path in Path(folder).rglob("*.png"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_there_are_as_many_portraits_as_combinations_of_parts(monsters: Portraits) -> None:
    assert monsters.combinations == 10**6 * 16
    part = Image.new("RGBA", (1, 1))
    assert Portraits((((part,) * 3, (part,) * 4), ((part,) * 3, (part,) * 4))).combinations == 24


def test_parts_are_layered_over_a_plain_background(monsters: Portraits) -> None:
    portrait = monsters.compose(0)
    assert (portrait.mode, portrait.size) == ("RGB", (32, 32))
    assert portrait.getpixel((0, 0)) == (238, 238, 238)
    assert len(portrait.getcolors(1024)) > 50


def test_another_combination_is_another_portrait(monsters: Portraits) -> None:
    portraits = {monsters.compose(number).tobytes() for number in range(0, monsters.combinations, 10**6)}
    assert len(portraits) == 16


def test_held_out_portraits_share_no_combination_with_training_ones(monsters: Portraits) -> None:
    training = training_combinations(0, "monster", monsters, 0, 5000)
    held_out = held_out_combinations(0, "monster", monsters, 500)
    assert len({*training, *held_out}) == 5500
    assert held_out[-100:] == held_out_combinations(0, "monster", monsters, 100)


def test_even_a_class_used_up_has_no_combination_twice() -> None:
    part = Image.new("RGBA", (1, 1))
    few = Portraits((((part,) * 3, (part,) * 4), ((part,) * 3, (part,) * 4)))
    training = training_combinations(1, "few", few, 0, 20)
    assert sorted(training + held_out_combinations(1, "few", few, 4)) == list(range(24))


def test_portraits_are_a_function_of_seed_class_and_index(recipe: Recipe, tmp_path: Path) -> None:
    compose(recipe)
    more = Recipe(name="test", demo=DemoImages(per_class=9), data=Data(images=str(tmp_path / "more"), resolution=32))
    compose(more)
    first = digests(recipe.data.images)
    assert len(first) == 6
    assert first.items() < digests(more.data.images).items()
    assert not set(first.values()) & set(digests(recipe.data.held_out or "").values())


def test_finished_work_is_skipped_and_other_settings_replace_it(recipe: Recipe, tmp_path: Path) -> None:
    compose(recipe)
    marker = Path(recipe.data.images) / MARKER
    written = marker.stat().st_mtime_ns
    assert all("(finished)" in line for line in plan(recipe))
    compose(recipe)
    assert marker.stat().st_mtime_ns == written
    more = Recipe(name="test", demo=DemoImages(per_class=7), data=recipe.data)
    compose(more)
    assert len(digests(recipe.data.images)) == 7


def test_finished_portraits_are_finished_where_robohash_is_not_installed(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(portraits, "version", missing)
    assert not finished(recipe)
    monkeypatch.undo()
    monkeypatch.setattr(portraits, "CLASSES", {"monster": "set2"})
    compose(recipe)
    monkeypatch.setattr(portraits, "version", missing)
    assert finished(recipe)


def test_a_folder_of_the_users_own_is_never_replaced(recipe: Recipe) -> None:
    own = Path(recipe.data.images) / "monster" / "mine.png"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"mine")
    with pytest.raises(UserError, match="not made by this command"):
        compose(recipe)
    assert own.read_bytes() == b"mine"


def test_a_recipe_without_the_section_is_refused() -> None:
    with pytest.raises(UserError, match="demo: the recipe has no such section"):
        plan(Recipe(name="test"))


def test_the_four_classes_are_composed_and_readable_as_a_source(tmp_path: Path) -> None:
    from tests.photographs import source_of

    compose(
        Recipe(
            name="test",
            demo=DemoImages(per_class=2),
            data=Data(images=str(tmp_path / "images"), held_out=None, resolution=16),
        )
    )
    source = source_of("folder", tmp_path / "images")
    assert source.class_names == sorted(CLASSES)
    assert (len(source.entries), source.left_out) == (8, {"hidden": 1})
    assert np.asarray(Image.open(tmp_path / "images" / source.entries[0].key)).shape == (16, 16, 3)


def test_the_portraits_are_those_that_the_shipped_autoencoder_was_held_out_from(monsters: Portraits) -> None:
    assert held_out_combinations(0, "monster", monsters, 2) == [2928542, 2809664]
    assert training_combinations(0, "monster", monsters, 0, 2) == [8902331, 11061547]
