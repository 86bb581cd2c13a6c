"""Classes are the folders that are meant; every other layout is refused in one line that says what is there."""

from pathlib import Path

import pytest

from common.errors import UserError
from common.loading import parse_recipe
from preprocess.sources import Source
from tests.photographs import source_of, write_folder, write_zip


def layout(path: Path, keys: list[str], kind: str = "folder", form: str = "folder", **options: object) -> Source:
    files = {key: key.encode() for key in keys}
    made = write_folder(path / "x", files) if form == "folder" else write_zip(path / "x.zip", files)
    return source_of(kind, made, **options)


def labels(source: Source) -> dict[str, str]:
    return {entry.key: source.class_names[entry.label] for entry in source.entries}


FORMS = pytest.mark.parametrize("form", ["folder", "zip"])

CLASSES = {
    "one folder a class": (["cat/1.png", "dog/1.png"], ["cat", "dog"]),
    "below one folder, as archives have it": (["mydata/cat/1.png", "mydata/dog/1.png"], ["cat", "dog"]),
    "below several": (["data/images/cat/1.png", "data/images/dog/1.png", "README"], ["cat", "dog"]),
    "below a split that is alone": (["train/cat/1.png", "train/dog/1.png"], ["cat", "dog"]),
    "beside other files": (["data/cat/1.png", "data/dog/1.png", "annotations/1.xml"], ["cat", "dog"]),
    "tiny ImageNet's": (["n1/images/n1_0.JPEG", "n1/n1_boxes.txt", "n2/images/n2_0.JPEG"], ["n1", "n2"]),
    "one class": (["cat/1.png"], ["cat"]),
    "one class, deeper": (["cat/images/1.png"], ["cat"]),
    "one class, at several depths": (["cat/1.png", "cat/more/2.png"], ["cat"]),
    "images alone": (["1.png", "2.png"], ["x"]),
    "images and a folder of something else": (["1.png", "notes/1.txt"], ["x"]),
    "classes beside a system's folders": (["cat/1.png", "dog/1.png", "__MACOSX/a", ".cache/b"], ["cat", "dog"]),
    "classes that are named as one split": (["train/1.png", "bus/1.png"], ["bus", "train"]),
    "classes named after trains and tests": (
        ["bullet_train/1.png", "blood_test/1.png"],
        ["blood_test", "bullet_train"],
    ),
    "dataset_tool's parts without labels": (["00000/img00000000.png", "00001/img00010000.png"], ["x"]),
    "dataset_tool's single part": (["00000/img00000000.png"], ["x"]),
    "numbers that are classes": (["00000/1.png", "00001/2.png"], ["00000", "00001"]),
}


@FORMS
@pytest.mark.parametrize("case", CLASSES)
def test_classes_are_the_folders_that_are_meant(tmp_path: Path, case: str, form: str) -> None:
    keys, names = CLASSES[case]
    source = layout(tmp_path, keys, form=form)
    assert source.class_names == names
    if len(names) > 1:
        assert all(name in key.split("/") for key, name in labels(source).items())
    assert len(source.entries) + source.left_out.total() == len(keys)


REFUSED = {
    "splits": (["train/a/1.png", "val/a/1.png"], r"x(\.zip)? holds the splits train, val, .* as .*x(\.zip)?/train$"),
    "splits of images": (["train/1.png", "test/2.png"], "the splits test, train"),
    "splits in one folder": (["data/training/a/1.png", "data/validation/a/1.png"], r"/data holds the splits train"),
    "splits in other words": (["Train/a/1.png", "Valid/a/1.png", "TEST/1.png"], "splits TEST, Train, Valid"),
    "splits with years": (["train2017/1.jpg", "val2017/1.jpg"], "splits train2017, val2017"),
    "splits of domains": (["trainA/1.jpg", "trainB/1.jpg", "testA/1.jpg"], "splits testA, trainA, trainB"),
    "splits with a name": (["cats_train/a/1.jpg", "cats_val/a/1.jpg"], "splits cats_train, cats_val"),
    "splits and more": (["train/a/1.png", "val/a/1.png", "extra/a/1.png"], "the splits train, val"),
    "splits in each class": (["a/train/1.png", "a/test/1.png", "b/train/1.png"], "/a is a class that holds the splits"),
    "images beside classes": (["a/1.png", "b/1.png", "1.png"], r"both images \(1\.png\) and folders .* \(a, b\)"),
    "a class of text": (["a/1.png", "b/1.png", "c/n.txt"], r"/c holds no images but .* \(1 not an image: \.txt\)"),
    "a class of HEIC": (["a/1.png", "b/1.heic"], r"/b holds no images .*1 encoded as HEIC.*; convert them, or move"),
    "a class of hidden files": (["a/1.png", "b/1.png", "c/.1.png"], r"/c holds no images but other files \(1 hidden\)"),
}  # fmt: skip


ONE_CLASS = {
    "nested folders": ["images/all/a/1.jpg", "images/all/b/2.jpg"],
    "images beside folders": ["1.jpg", "a/2.jpg", "a/b/3.jpg", "notes/1.txt"],
    "labels of dataset_tool": ["00000/1.jpg", "dataset.json"],
    "classes": ["cat/1.jpg", "dog/1.jpg", "32/1.jpg", "64/1.jpg"],
}


@FORMS
@pytest.mark.parametrize("case", ONE_CLASS)
def test_all_images_are_one_class_where_the_recipe_says_so(tmp_path: Path, case: str, form: str) -> None:
    recipe = parse_recipe("name: a", ["data.source=folder", "data.label_field=none"])
    source = layout(tmp_path, ONE_CLASS[case], form=form, label_field=recipe.data.label_field)
    images = [key for key in ONE_CLASS[case] if key.endswith(".jpg")]
    assert labels(source) == dict.fromkeys(images, "x")
    assert len(source.entries) + source.left_out.total() == len(ONE_CLASS[case])


@pytest.mark.parametrize("keys", [["train/1.jpg", "val/2.jpg"], ["a/train/1.jpg", "a/val/2.jpg", "b/3.jpg"]])
def test_splits_are_not_one_class(tmp_path: Path, keys: list[str]) -> None:
    with pytest.raises(UserError, match="holds the splits train, val, side by side; name one of them"):
        layout(tmp_path, keys, label_field="none")


def test_splits_that_could_be_classes_must_be_renamed(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="the splits test, train, side by side; rename them if they are classes, or name"
    ):
        layout(tmp_path, ["train/1.jpg", "test/2.jpg", "bus/3.jpg"])


def test_splits_are_read_together_through_links_of_other_names(tmp_path: Path) -> None:
    """CelebA-HQ's 30,000, which are passed on as `{train,val}/{male,female}`."""
    keys = ["train/male/1.jpg", "train/female/2.jpg", "val/male/3.jpg", "val/female/4.jpg"]
    write_folder(tmp_path / "celeba_hq", {key: key.encode() for key in keys})
    (tmp_path / "whole").mkdir()
    for link, split in (("a", "train"), ("b", "val")):
        (tmp_path / "whole" / link).symlink_to(tmp_path / "celeba_hq" / split)
    source = source_of("celebahq", tmp_path / "whole", follow_links=True)
    assert sorted(source.open(entry) for entry in source.entries) == sorted(key.encode() for key in keys)


@pytest.mark.parametrize("field", ["image_field", "label_field"])
@pytest.mark.parametrize("form", ["folder", "zip", "tar"])
def test_a_column_is_not_named_of_imagenets_folders_and_archives(tmp_path: Path, form: str, field: str) -> None:
    path = write_folder(tmp_path / "x", {"n01440764/1.JPEG": b""})
    if form != "folder":
        path = write_zip(tmp_path / f"x.{form}", {"n01440764/1.JPEG": b""})
    with pytest.raises(UserError, match=rf"data\.{field}: x names a column of parquet files, but .* is not parquet"):
        source_of("imagenet", path, **{field: "x"})


@FORMS
@pytest.mark.parametrize("case", REFUSED)
def test_other_layouts_are_refused_with_their_content(tmp_path: Path, case: str, form: str) -> None:
    keys, told = REFUSED[case]
    with pytest.raises(UserError, match=told) as found:
        layout(tmp_path, keys, form=form)
    assert "fill it or remove it" not in str(found.value)
    assert "num_classes" not in str(found.value)


def test_removal_is_advised_for_empty_folders_only(tmp_path: Path) -> None:
    path = write_folder(tmp_path, {"a/1.png": b"", "b/1.png": b""})
    (path / "c/d").mkdir(parents=True)
    with pytest.raises(UserError, match=r"/c is empty, beside folders of images, the classes; fill it or remove it"):
        source_of("folder", path)


@FORMS
def test_the_folder_that_a_refusal_names_is_read(tmp_path: Path, form: str) -> None:
    keys = ["data/train/cat/1.png", "data/train/dog/1.png", "data/val/cat/1.png"]
    with pytest.raises(UserError, match="name one of them, such as ") as found:
        layout(tmp_path, keys, form=form)
    source = source_of("folder", str(found.value).rpartition(" as ")[2])
    assert labels(source) == {"cat/1.png": "cat", "dog/1.png": "dog"}
    assert [source.open(entry) for entry in source.entries] == [key.encode() for key in keys[:2]]


TENCH, GOLDFISH = "n01440764", "n01443537"
WNIDS = [f"{TENCH}/1.JPEG", f"{GOLDFISH}/1.JPEG"]

IMAGENET = {
    "its folders": WNIDS,
    "below one folder": [f"ILSVRC2012/train/{key}" for key in WNIDS],
    "with other files": [*WNIDS, "LICENSE", "loc_train.csv", "Annotations/1.xml", f"{TENCH}/boxes.txt"],
    "with annotations by wnid": [
        *(f"Data/CLS-LOC/train/{key}" for key in WNIDS),
        f"Annotations/CLS-LOC/train/{TENCH}/1.xml",
    ],
    "tiny ImageNet's": [f"{TENCH}/images/1.JPEG", f"{GOLDFISH}/images/1.JPEG", f"{TENCH}/boxes.txt"],
}


@FORMS
@pytest.mark.parametrize("case", IMAGENET)
def test_imagenets_classes_are_found(tmp_path: Path, case: str, form: str) -> None:
    source = layout(tmp_path, IMAGENET[case], "imagenet", form)
    assert [name.split()[0] for name in source.class_names] == [TENCH, GOLDFISH]
    assert all(name.split()[0] in key for key, name in labels(source).items())
    assert len(source.entries) + source.left_out.total() == len(IMAGENET[case])


ILSVRC = "ILSVRC/Data/CLS-LOC"
NOT_IMAGENET = {
    "validation images beside": (
        [*(f"{ILSVRC}/train/{key}" for key in WNIDS), f"{ILSVRC}/val/1.JPEG", "ILSVRC/ImageSets/train.txt"],
        r"further down; name one of them: .*/ILSVRC/Data/CLS-LOC/train$",
    ),
    "two splits": (
        [f"{split}/{key}" for split in ("train", "val") for key in WNIDS],
        r"name one of them: .*/train, .*/val$",
    ),
    "validation images alone": (["val/ILSVRC2012_val_00000001.JPEG"], "holds 'val', which is none of ImageNet-1k's"),
    "images alone": (["ILSVRC2012_val_00000001.JPEG"], "holds 'ILSVRC2012_val_00000001.JPEG', which is none of"),
    "other classes beside": ([*WNIDS, "cat/1.JPEG"], "holds 'cat', which is none of"),
    "images beside": ([*WNIDS, "1.JPEG"], "holds '1.JPEG', which is none of"),
    "tars of wnids": ([f"{TENCH}.tar", f"{GOLDFISH}.tar"], "ILSVRC2012_img_train.tar with imagenet: name one itself"),
    "a wnid of something else": ([*WNIDS, "n02007558/1.xml"], r"/n02007558 holds no images but .*\.xml"),
}


@FORMS
@pytest.mark.parametrize("case", NOT_IMAGENET)
def test_other_layouts_of_imagenet_are_refused_with_the_right_folder(tmp_path: Path, case: str, form: str) -> None:
    keys, told = NOT_IMAGENET[case]
    with pytest.raises(UserError, match=told) as found:
        layout(tmp_path, keys, "imagenet", form)
    assert "fill it or remove it" not in str(found.value)


def faces(*groups: str, count: int = 2, number: int = 0) -> list[str]:
    """As many images in each folder, numbered in one way."""
    return [group.format(f"{number + each:05d}") for group in groups for each in range(count)]


FACES = {
    "CelebAMask-HQ": (
        ["CelebA-HQ-img/0.jpg", "CelebA-HQ-img/1.jpg", "CelebAMask-HQ-mask-anno/0/00000_hair.png", "pose.txt"],
        {"masks and maps of faces": 1, "not an image: .txt": 1},
    ),
    "CelebAMask-HQ in one folder": (
        ["CelebAMask-HQ/CelebA-HQ-img/0.jpg", "CelebAMask-HQ/CelebAMask-HQ-mask-anno/14/00000_l_eye.png"],
        {"masks and maps of faces": 1},
    ),
    "masks among the faces": (["0.jpg", "00000_skin.png", "00000_u_lip.png"], {"masks and maps of faces": 2}),
    "FFHQ as published": (
        ["ffhq-dataset-v2.json", "images1024x1024/00000/00000.png", "images1024x1024/01000/01000.png",
         "thumbnails128x128/00000/00000.png", "in-the-wild-images/00000/00000.png"],
        {"not an image: .json": 1, "thumbnails": 1, "in-the-wild images, not aligned": 1},
    ),
    "FFHQ's thumbnails alone": (["thumbnails128x128/00000/00000.png", "LICENSE"], {"not an image: no suffix": 1}),
    "maps beside": (["images/0.jpg", "sketch/0.jpg", "seg_maps/0.png", "text/0.txt"], None),
    "by another name": (["female/1.jpg", "male/2.jpg"], {}),
    "one resolution": (["data256x256/1.jpg", "data256x256/2.jpg"], {}),
    "numbered folders": ([f"{number}/{number}.jpg" for number in range(70)], {}),
    "numbered parts": ([f"images/part-{number}/{number}.jpg" for number in range(140)], {}),
    "numbered parts of one resolution": ([f"data256x256/part{number}/{number}.jpg" for number in range(33, 65)], {}),
}  # fmt: skip


@FORMS
@pytest.mark.parametrize("case", FACES)
@pytest.mark.parametrize("kind", ["ffhq", "celebahq"])
def test_masks_thumbnails_and_unaligned_images_are_no_faces(tmp_path: Path, case: str, form: str, kind: str) -> None:
    keys, left_out = FACES[case]
    source = layout(tmp_path, keys, kind, form)
    assert source.class_names == ["face"]
    assert left_out is None or source.left_out == left_out
    assert len(source.entries) + source.left_out.total() == len(keys)
    assert not any(each in entry.key for entry in source.entries for each in ("anno", "wild", "sketch", "seg", "_skin"))


SEVERAL_FACES = {
    "resolutions": (
        faces("data128x128/{}.jpg", "data256x256/{}.jpg", "data1024x1024/{}.jpg"),
        r"several resolutions \(data1024x1024, data128x128, data256x256\), side by side; name .*/data1024x1024$",
    ),
    "resolutions as numbers": (faces("256/{}.jpg", "512/{}.jpg"), r"several resolutions \(256, 512\)"),
    "resolutions beside numbered folders": (
        [*faces("0/{}.jpg"), *faces("32x32/{}.jpg", number=9), *faces("64px/{}.jpg", number=20)],
        r"several resolutions \(32x32, 64px\)",
    ),
    "resolutions of one data set": (faces("celeba_hq_256/{}.jpg", "celeba_hq_1024/{}.jpg"), "several resolutions"),
    "resolutions as suffixes": (faces("celeba-256/{}.jpg", "celeba-64px/{}.jpg"), "several resolutions"),
    "resolutions of other images": (
        [*faces("a_128/{}.jpg"), *faces("a_256/{}.jpg", number=9)],
        r"several resolutions \(a_128, a_256\)",
    ),
    "copies": (faces("images/{}.png", "resized/{}.jpg"), "images/00000.png and resized/00000.jpg, the same face again"),
    "copies in each folder": (faces("female/big/{}.png", "female/small/{}.png"), "the same face again by their names"),
    "copies in two encodings": (faces("{}.jpg", "{}.npy"), "00000.jpg and 00000.npy, the same face again"),
    "splits": (["train/1.jpg", "val/2.jpg"], "holds the splits train, val"),
    "splits with folders": (["celeba_hq/train/male/1.jpg", "celeba_hq/val/male/2.jpg"], "the splits train, val"),
    "a teaser": (["ffhq-teaser.png", *faces("images1024x1024/{}.png")], r"images \(ffhq-teaser\.png\) and folders"),
    "masks alone": (["0/00000_hair.png", "0/00000_skin.png"], "holds masks alone"),
    "thumbnails and unaligned images": (
        faces("thumbnails128x128/{}.png", "in-the-wild-images/{}.png"),
        "the same face again",
    ),
}


@FORMS
@pytest.mark.parametrize("case", SEVERAL_FACES)
def test_faces_that_are_there_several_times_are_not_merged(tmp_path: Path, case: str, form: str) -> None:
    keys, told = SEVERAL_FACES[case]
    with pytest.raises(UserError, match=told):
        layout(tmp_path, keys, "celebahq", form)


LSUN = {
    "splits": (["church_outdoor_train/a.webp", "church_outdoor_val/b.webp"], "splits church_outdoor_train, church"),
    "scenes": (
        ["bedroom_train/a.webp", "church_outdoor_train/b.webp"],
        "the scenes bedroom_train, church_outdoor_train",
    ),
    "resolutions": (["church128/a.jpg", "church256/a.jpg"], "several resolutions"),
}


@FORMS
@pytest.mark.parametrize("case", LSUN)
def test_splits_and_scenes_of_lsun_are_not_merged(tmp_path: Path, case: str, form: str) -> None:
    keys, told = LSUN[case]
    with pytest.raises(UserError, match=told):
        layout(tmp_path, keys, "lsun", form)


def test_lsuns_tree_of_hashes_is_one_class(tmp_path: Path) -> None:
    keys = ["a/b/c/abc1.webp", "a/b/d/abd2.webp", "0/1/2/0123.webp"]
    assert labels(layout(tmp_path, keys, "lsun")) == dict.fromkeys(sorted(keys), "x")
