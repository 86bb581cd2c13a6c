"""What differs from the data set that a recipe names is said in plan, summary and index; it stops nothing."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from common.command import run_command
from common.errors import UserError
from common.loading import dump_recipe
from common.recipe import VAE, Data, Model, Recipe
from preprocess.shards import LatentShards
from preprocess.sources import Entry, warnings
from tests.encoding_stage import encode, plan
from tests.photographs import photographs, write_folder


class Counted:
    """A source of so many images of nothing."""

    def __init__(self, images: int, class_names: list[str], left_out: dict[str, int] | None = None) -> None:
        self.class_names, self.left_out = class_names, Counter(left_out or {})
        self.entries = range(images)  # which are counted

    def open(self, entry: Entry) -> bytes:
        raise NotImplementedError(entry)


WNIDS = [str(label) for label in range(1000)]
CHURCH = "warning: LSUN's church_outdoor, for training, has 126,227 images, found"

TOLD: dict[str, tuple[str, Counted, list[str]]] = {
    "FFHQ": ("ffhq", Counted(70_000, ["face"]), []),
    "CelebA-HQ": ("celebahq", Counted(30_000, ["face"]), []),
    "church_outdoor": ("lsun", Counted(126_227, ["church_outdoor_train"]), []),
    "church_outdoor's validation": ("lsun", Counted(300, ["church_outdoor_val"]), []),
    "classes of one's own": ("folder", Counted(3, ["a", "b"]), []),
    "a scene of one's own": ("lsun", Counted(3, ["castles"]), []),
    "ImageNet's validation images": (
        "imagenet",
        Counted(50_000, WNIDS),
        ["warning: ImageNet-1k's training set has 1,281,167 images, found 50,000, as many as its validation images"],
    ),
    "a part of ImageNet": (
        "imagenet",
        Counted(13, WNIDS[:10]),
        [
            "warning: ImageNet-1k's training set has 1,281,167 images, found 13",
            "warning: ImageNet-1k has 1,000 classes, found 10",
        ],
    ),
    "FFHQ but one": ("ffhq", Counted(69_999, ["face"]), ["warning: FFHQ has 70,000 images, found 69,999"]),
    "CelebA-HQ twice": (
        "celebahq",
        Counted(60_000, ["face"]),
        ["warning: CelebA-HQ has 30,000 images, found 60,000, 2 times as many: are there copies?"],
    ),
    "a part of church_outdoor": (
        "lsun",
        Counted(300, ["church_outdoor"]),
        [f"{CHURCH} 300, as many as those for validation"],
    ),
    "another scene": (
        "lsun",
        Counted(5, ["lsun_bedroom_train"]),
        ["warning: LSUN's bedroom, for training, has 3,033,042 images, found 5"],
    ),
    "images that are not read": (
        "folder",
        Counted(9, ["a"], {"encoded as HEIC, which is not supported; convert to PNG or JPEG": 2}),
        ["warning: 2 images are in unsupported formats and left out"],
    ),
    "most files left out": (
        "folder",
        Counted(9, ["a"], {"not an image: no suffix": 10, "hidden": 99}),
        ["warning: most files are left out: 10 have no image's name, 9 have"],
    ),
}


@pytest.mark.parametrize("case", TOLD)
def test_an_unexpected_number_of_images_is_a_warning(case: str) -> None:
    kind, source, expected = TOLD[case]
    assert warnings(kind, source) == expected


def test_all_of_imagenet_needs_no_warning() -> None:
    assert not warnings("imagenet", Counted(1_281_167, WNIDS))


@pytest.fixture
def recipe(tmp_path: Path, tiny_vae: Path) -> Recipe:
    """Faces beside masks and others, whose number is not that of CelebA-HQ."""
    images = photographs(3, side=(16, 16))
    files = {f"CelebA-HQ-img/{number}.jpg": data for number, data in enumerate(images)}
    files |= {"CelebAMask-HQ-mask-anno/0/00000_hair.png": b"", "README": b"", "CelebA-HQ-img/3.heic": b""}
    images = write_folder(tmp_path / "CelebAMask-HQ", files)
    return Recipe(
        name="test",
        data=Data(images=str(images), source="celebahq", shards=str(tmp_path / "shards"), resolution=16),
        vae=VAE(path=str(tiny_vae), downsampling=4),
        model=Model(num_classes=1),
    )


WARNINGS = [
    "warning: CelebA-HQ has 30,000 images, found 3",
    "warning: 1 images are in unsupported formats and left out",
]


def test_warnings_and_files_left_out_are_in_the_plan_the_summary_and_the_index(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = plan(recipe)
    encode(recipe)
    summary = capsys.readouterr().out.splitlines()
    index = LatentShards(recipe.data.shards).index
    assert index["warnings"] == WARNINGS
    assert index["left_out"] == {
        "encoded as HEIC, which is not supported; convert to PNG or JPEG": 1,
        "masks and maps of faces": 1,
        "not an image: no suffix": 1,
    }
    for told in (lines, summary):
        assert [line for line in told if line.startswith("warning:")] == WARNINGS
        assert "left out: 1 (masks and maps of faces)" in told
    assert any(line.startswith("images: 3 in 1 class (face) below ") for line in lines)


def test_of_many_reasons_the_most_common_are_in_the_plan(recipe: Recipe) -> None:
    write_folder(Path(recipe.data.images), {f"{number}.x{number}": b"" for number in range(50)})
    lines = [line for line in plan(recipe) if line.startswith("left out: ")]
    assert len(lines) == 6
    assert lines[-1] == "left out: 48 more for 48 other reasons (all of them: index.json)"


def changed(recipe: Recipe, kind: str, files: dict[str, bytes], classes: int) -> Recipe:
    images = write_folder(Path(recipe.data.images).parent / "other", files)
    return replace(recipe, data=replace(recipe.data, images=str(images), source=kind), model=Model(num_classes=classes))


WNID_FILES = {f"{wnid}/1.JPEG": b"" for wnid in ("n01440764", "n01443537")}
ADVICE = {
    "classes that may be meant": (
        "folder",
        {"cat/1.png": b"", "dog/1.png": b""},
        3,
        r"3, but .*other has 2 classes \(cat, dog\); if these are the intended classes, set model\.num_classes=2$",
    ),
    "classes that are one": (
        "folder",
        {"cat/1.png": b"", "dog/1.png": b""},
        1,
        r"set model\.num_classes=2; if all images are one class, set data\.label_field=none$",
    ),
    "no classes": ("folder", {"cat/1.png": b""}, 1000, r"has 1 class \(cat\); without labels a class-"),
    "a part of ImageNet": (
        "imagenet",
        WNID_FILES,
        1000,
        "2 classes .*name all 1,000, or set model.num_classes=2 to train",
    ),
    "faces": ("ffhq", {"1.png": b""}, 1000, r"has 1 class \(face\); set model\.num_classes=1$"),
}


@pytest.mark.parametrize("case", ADVICE)
def test_advice_on_the_number_of_classes_fits_the_data(recipe: Recipe, case: str) -> None:
    kind, files, classes, told = ADVICE[case]
    with pytest.raises(UserError, match=told) as found:
        plan(changed(recipe, kind, files, classes))
    assert "\n" not in str(found.value)
    assert ("set model.num_classes" in str(found.value)) == (case != "no classes")


def test_a_warning_begins_its_line_on_the_terminal(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    assert run_command("", plan, encode, ["--config", str(path), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("warning:")] == WARNINGS
    assert any(line.startswith("plan: images: 3 in 1 class (face)") for line in lines)
