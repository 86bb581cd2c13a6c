"""Parquet files give every image under its label, whatever their columns are called, or say which is to be named."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from common.errors import UserError
from preprocess.images.images import Rejected
from preprocess.sources import Source, warnings
from tests.photographs import source_of, write_folder
from tests.planted import JPEG, PNG

LABELS = [1, 0, 2, 1]
IMAGES = [JPEG, PNG, JPEG + b"x", PNG + b"x"]
STRUCTS = [{"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(IMAGES)]


def write(path: Path, columns: dict[str, Any], features: dict[str, Any] | None = None) -> Path:
    """A file of these columns, in row groups of two; `features` as `datasets` describes columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table(columns)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, path, row_group_size=2)
    return path


def class_label(*names: str) -> dict[str, Any]:
    return {"_type": "ClassLabel", "names": list(names)}


def refused(path: object, kind: str = "parquet", **options: str) -> str:
    with pytest.raises(UserError) as found:
        source_of(kind, path, **options)
    message = str(found.value)
    assert message.startswith("data.")
    assert "\n" not in message
    assert "num_classes" not in message
    return message


def labels(source: Source) -> list[int]:
    return [entry.label for entry in source.entries]


def check(source: Source, expected: list[int] = LABELS) -> None:
    assert labels(source) == expected
    assert [source.open(entry) for entry in source.entries] == IMAGES


@pytest.mark.parametrize(
    "name",
    ["label", "labels", "Label", "cls", "class", "class_id", "fine_label", "target", "category", "y", "label_idx"],
)
@pytest.mark.parametrize("kind", ["int64", "int8", "uint64"])
def test_labels_are_read_from_any_usual_column(tmp_path: Path, name: str, kind: str) -> None:
    path = write(tmp_path / "x.parquet", {"image": STRUCTS, name: pyarrow.array(LABELS, kind)})
    source = source_of("parquet", path)
    check(source)
    assert (source.class_names, source.left_out) == (["0", "1", "2"], {})


@pytest.mark.parametrize("name", ["label", "labels", "fine_label", "artist", "whatever it is"])
def test_a_column_that_datasets_knows_as_labels_has_its_names(tmp_path: Path, name: str) -> None:
    path = write(
        tmp_path / "x.parquet", {"image": STRUCTS, name: LABELS}, {name: class_label("cat", "dog", "owl", "yak")}
    )
    source = source_of("parquet", path)
    check(source)
    assert source.class_names == ["cat", "dog", "owl", "yak"]


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_labels_that_are_names_are_numbered_in_their_order(tmp_path: Path, kind: str) -> None:
    names = ["dog", "cat", "owl", "dog"]
    array = pyarrow.array(names).dictionary_encode() if kind == "dictionary" else pyarrow.array(names, kind)
    source = source_of("parquet", write(tmp_path / "x.parquet", {"image": STRUCTS, "label": array}))
    check(source)
    assert source.class_names == ["cat", "dog", "owl"]


def test_booleans_and_numbers_as_text_are_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", {"image": STRUCTS, "label": [True, False, True, True]})
    check(source_of("parquet", path), [1, 0, 1, 1])
    path = write(tmp_path / "x.parquet", {"image": STRUCTS, "label": ["10", "9", "2", "10"]})
    check(source_of("parquet", path), [10, 9, 2, 10])


TWO = {"fine": [1, 0, 2, 1], "coarse": [0, 0, 1, 0]}


def test_of_several_labels_one_is_to_be_named(tmp_path: Path) -> None:
    columns = {"img": STRUCTS, "fine_label": TWO["fine"], "coarse_label": TWO["coarse"]}
    features = {"fine_label": class_label("a", "b", "c"), "coarse_label": class_label("d", "e")}
    path = write(tmp_path / "x.parquet", columns, features)
    message = refused(path)
    assert "0 (coarse_label) and 1 (fine_label) at x.parquet/000000" in message
    assert "set data.label_field" in message
    fine = source_of("parquet", path, label_field="fine_label")
    check(fine)
    assert (fine.class_names, fine.left_out, warnings("parquet", fine)) == (["a", "b", "c"], {}, [])
    coarse = source_of("parquet", path, label_field="coarse_label")
    check(coarse, TWO["coarse"])
    none = source_of("parquet", path, label_field="none")
    check(none, [0] * 4)
    assert (none.left_out, warnings("parquet", none)) == ({}, [])
    assert "data.label_field: nowhere is no column of" in refused(path, label_field="nowhere")


def test_unused_columns_that_could_be_labels_are_named_in_a_warning(tmp_path: Path) -> None:
    columns = {"image": STRUCTS, "identity": LABELS, "caption": list("abcd")}
    for number in range(2):
        write(tmp_path / f"{number}.parquet", columns)
    source = source_of("parquet", tmp_path)
    assert (labels(source), source.class_names) == ([0] * 8, ["0"])
    (warning,) = warnings("parquet", source)
    assert "all images are one class; columns not read: identity, caption; set data.label_field" in warning
    assert source.left_out == {}  # files, and these are read
    check(source_of("parquet", tmp_path / "0.parquet", label_field="identity"))
    assert source_of("parquet", tmp_path / "0.parquet", label_field="caption").class_names == list("abcd")


BAD_LABELS: dict[str, tuple[Any, str]] = {
    "floats": ([0.0, 1.0, 2.0, 1.0], r"row 0, has no supported label; .*'0\.0', which is no class index"),
    "nan": ([float("nan")] * 4, "'nan', which is no class index"),
    "lists": ([[1], [0, 2], [], [1]], r"'\[1\]', which is no class index"),
    "structures": ([{"id": 1}] * 4, "which is no class index"),
    "bytes": ([b"1"] * 4, "which is no class index"),
    "a null": ([1, 0, None, 1], r"for 3 of 4 images, not for x\.parquet/000002"),
    "nulls": (pyarrow.nulls(4), "for 0 of 4 images"),
    "below zero": ([1, -1, 2, 1], r"x\.parquet/000001 has the label -1 \(label\).*labelled split"),
    "60 bits": (pyarrow.array([1, 2**64 - 1, 2, 1], "uint64"), "has the label 18446744073709551615"),
    "numbers and names": (["1", "cat", "2", "1"], "both numbers and names in label"),
    "texts": (["a" * 300] * 4, "no class index and no name"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_unsupported_labels_never_become_one_class(tmp_path: Path, case: str) -> None:
    column, reason = BAD_LABELS[case]
    path = write(tmp_path / "x.parquet", {"image": STRUCTS, "label": column})
    with pytest.raises(UserError, match=reason) as found:
        source_of("parquet", path)
    assert "data.label_field" in str(found.value)
    assert "download" not in str(found.value)
    check(source_of("parquet", path, label_field="none"), [0] * 4)


@pytest.mark.parametrize("name", ["image", "img", "jpg", "png", "Image", "photo", "content", "image.bytes"])
@pytest.mark.parametrize("form", ["structure", "bytes", "large bytes"])
def test_the_images_column_is_found_by_its_name_or_its_type(tmp_path: Path, name: str, form: str) -> None:
    column = STRUCTS if form == "structure" else pyarrow.array(IMAGES, "binary" if form == "bytes" else "large_binary")
    columns = {"image.path": list("abcd"), name: column, "label": LABELS}
    source = source_of("parquet", write(tmp_path / "x.parquet", columns))
    check(source)


def test_of_several_columns_of_images_the_usual_one_is_taken_or_one_is_to_be_named(tmp_path: Path) -> None:
    masks = [{"bytes": b"mask", "path": None}] * 4
    path = write(tmp_path / "x.parquet", {"mask": masks, "image": STRUCTS, "label": LABELS})
    source = source_of("parquet", path)
    check(source)
    assert source_of("parquet", path, image_field="mask").open(source.entries[0]) == b"mask"
    for other in ("scan", "photo"):
        path = write(tmp_path / "y.parquet", {"image" if other == "photo" else "plan": masks, other: STRUCTS})
        assert "several columns that may hold the images" in refused(path)
        check(source_of("parquet", path, image_field=other), [0] * 4)
    assert "has no column 'nowhere'" in refused(path, image_field="nowhere")


BAD_IMAGES: dict[str, tuple[dict[str, Any], str]] = {
    "paths as text": ({"image": list("abcd")}, "column 'image' is of string, encoded images are read"),
    "paths in a structure": (
        {
            "image": pyarrow.array(
                [{"bytes": None, "path": "x"}] * 4, pyarrow.struct([("bytes", "binary"), ("path", "string")])
            )
        },
        "has only paths, and no bytes in any row",
    ),
    "a structure without bytes": ({"image": [{"path": "x"}] * 4}, "column 'image' is of struct"),
    "bytes of no type": ({"image": [{"bytes": None, "path": "x"}] * 4}, "column 'image' is of struct"),
    "lists of images": ({"images": [[each] for each in STRUCTS]}, r"no column of encoded images.*images \(list"),
    "a list of images": ({"image": [[each] for each in STRUCTS]}, "column 'image' is of list"),
    "pixels": ({"image": [[0, 1, 2]] * 4}, "column 'image' is of list"),
    "pixels beside bytes of another name": ({"image": [[0]] * 4, "mask": IMAGES}, "column 'image' is of list"),
    "no image": ({"text": list("abcd"), "label": LABELS}, "no column of encoded images; set data.image_field"),
    "no column": ({}, "no column of encoded images"),
    "no row": ({"image": pyarrow.array([], "binary"), "label": pyarrow.array([], "int64")}, "holds no rows"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_files_without_encoded_images_are_refused_by_name(tmp_path: Path, case: str) -> None:
    columns, reason = BAD_IMAGES[case]
    path = write(tmp_path / "x.parquet", columns)
    with pytest.raises(UserError, match=reason) as found:
        source_of("parquet", path)
    assert "download" not in str(found.value)


def test_a_row_with_a_path_alone_is_rejected_with_it(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", {"image": [{"bytes": JPEG, "path": "a"}, {"bytes": None, "path": "b"}]})
    source = source_of("parquet", path)
    assert source.open(source.entries[0]) == JPEG
    with pytest.raises(Rejected, match="no bytes in its row, only the path 'b'"):
        source.open(source.entries[1])


def twice(path: Path) -> Path:
    table = pyarrow.Table.from_arrays(
        [pyarrow.array(IMAGES), pyarrow.array(LABELS), pyarrow.array(LABELS)], ["image", "label", "label"]
    )
    parquet.write_table(table, path)
    return path


def with_metadata(path: Path, text: str) -> Path:
    table = pyarrow.table({"image": IMAGES, "label": LABELS}).replace_schema_metadata({"huggingface": text})
    parquet.write_table(table, path)
    return path


BAD_FILES = {
    "two columns of one name": (twice, "two columns 'label'"),
    "brackets without end": (
        lambda path: with_metadata(path, "[" * 100_000),
        "metadata that `datasets` does not write",
    ),
    "another structure": (lambda path: with_metadata(path, '{"info": [1]}'), "metadata that `datasets` does not write"),
    "features that are none": (
        lambda path: with_metadata(path, '{"info": {"features": {"a": 1}}}'),
        "`datasets` does not",
    ),
    "a note of Git LFS": (
        lambda path: write_text(path, "version https://git-lfs.github.com/spec/v1\n"),
        "git lfs pull",
    ),
    "nothing": (lambda path: write_text(path, ""), "is not a complete parquet file"),
    "a page": (lambda path: write_text(path, "<html>" * 99), "is not a complete parquet file"),
    "too few names": (
        lambda path: write(path, {"image": IMAGES, "label": LABELS}, {"label": class_label("a", "b")}),
        r"has the label 2 \(label\) and 2 class names",
    ),
}


def write_text(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_on_one_line(tmp_path: Path, case: str) -> None:
    make, reason = BAD_FILES[case]
    assert reason.replace("\\", "") in refused(make(tmp_path / "x.parquet"))


def test_files_of_one_set_have_the_same_columns_and_names(tmp_path: Path) -> None:
    columns = {"image": STRUCTS, "label": LABELS}
    write(tmp_path / "0.parquet", columns, {"label": class_label("a", "b", "c")})
    write(tmp_path / "1.parquet", columns, {"label": class_label("a", "c", "b")})
    assert "1.parquet has other class names than" in refused(tmp_path)
    write(tmp_path / "1.parquet", {"image": STRUCTS})
    assert "1.parquet has other columns of labels (none) than" in refused(tmp_path)
    write(tmp_path / "1.parquet", {"jpg": STRUCTS, "label": LABELS})
    assert "1.parquet has no column 'image', only jpg, label" in refused(tmp_path)


LAYOUTS = {  # files of training, of something else, and the pattern that names the first
    "hub": ("data/train-{}-of-00002.parquet", "data/test-{}-of-00002.parquet", "train-*-of-00002.parquet"),
    "hub, older": (
        "data/train-{}-of-00002-0123456789abcdef.parquet",
        "data/test-{}-of-00002-fedcba9876543210.parquet",
        "train-*-of-00002*.parquet",
    ),
    "converted": ("default/train/{}.parquet", "default/validation/{}.parquet", "train/*.parquet"),
    "converted in part": ("default/train/{}.parquet", "default/partial-train/{}.parquet", "train/*.parquet"),
    "configurations": ("64/train/{}.parquet", "full/train/{}.parquet", None),
    "configurations of splits": ("a/train-{}.parquet", "b/train-{}.parquet", "a/train-*.parquet"),
    "words": ("train{}.parquet", "valid{}.parquet", "train*.parquet"),
    "none": ("{}.parquet", "test_{}.parquet", "*.parquet"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_and_configurations_never_merge_and_keys_are_unique(tmp_path: Path, layout: str) -> None:
    *forms, pattern = LAYOUTS[layout]
    for form in forms:
        for number in range(2):
            write(tmp_path / form.format(f"{number:05d}"), {"image": STRUCTS, "label": LABELS})
    for path in (tmp_path, f"{tmp_path}/**/*.parquet"):
        message = refused(path)
        assert "2 sets of files that must not merge unnoticed" in message
    if pattern and layout != "none":
        assert message.endswith(f"/{pattern}")
        assert len(source_of("parquet", message.rpartition("name one, as ")[2]).entries) == 8
    for form in forms:
        one = source_of("parquet", f"{tmp_path}/{form.format('0000?')}")
        assert [entry.key for entry in one.entries][:5] == [
            *(f"{Path(form.format('00000')).name}/00000{row}" for row in range(4)),
            f"{Path(form.format('00001')).name}/000000",
        ]
    merged = source_of("parquet", "{" + ",".join(f"{tmp_path}/{form.format('0000?')}" for form in forms) + "}")
    assert len({entry.key for entry in merged.entries}) == 16


@pytest.mark.parametrize("root", ["", "data", "default/train", "a/b/c"])
def test_one_split_is_read_from_a_clone(tmp_path: Path, root: str) -> None:
    for number in range(2):
        write(tmp_path / root / f"{number:04d}.parquet", {"image": STRUCTS, "label": LABELS})
    beside = {"README.md": b"", ".gitattributes": b"", ".cache/huggingface/x.parquet": b"", "dataset_infos.json": b""}
    write_folder(tmp_path, beside)
    source = source_of("parquet", tmp_path)
    assert [entry.key for entry in source.entries][3:5] == ["0000.parquet/000003", "0001.parquet/000000"]
    assert source.left_out == {"not an image: .md": 1, "not an image: .json": 1, "hidden": 1} | {
        "hidden folder, not looked into": 1
    }


@pytest.mark.parametrize("hidden", ["lost+found", ".venv", "@eaDir"])
def test_hidden_folders_stop_nothing(tmp_path: Path, hidden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "data/0.parquet", {"image": STRUCTS, "label": LABELS})
    write_folder(tmp_path / "data" / hidden, {"1.parquet": b"", "2.parquet.part": b"", "lib/3.parquet": b""})
    (tmp_path / "data" / hidden / "lib64").symlink_to("lib")
    original = os.scandir

    def scandir(path: object) -> object:
        if hidden in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr("os.scandir", scandir)
    source = source_of("parquet", tmp_path)
    check(source)
    assert source.left_out == {"hidden folder, not looked into": 1}


@pytest.mark.parametrize("first", [0, 1])
def test_parts_are_numbered_from_0_or_1_and_must_be_complete(tmp_path: Path, first: int) -> None:
    for number in range(first, first + 3):
        write(tmp_path / f"x-0000{number}-of-00003.parquet", {"image": STRUCTS, "label": LABELS})
    assert len(source_of("parquet", tmp_path).entries) == 12
    (tmp_path / "x-00001-of-00003.parquet").unlink()
    assert f"has 0 files of part 1 of 00003, and each of {first} to {first + 2}" in refused(tmp_path)
    for number in (0, 1, 3):
        write(tmp_path / f"x-0000{number}-of-00003.parquet", {"image": STRUCTS, "label": LABELS})
    assert "has 1 files of part 3 of 00003, and each of 0 to 2" in refused(tmp_path)


def test_imagenets_parquet_is_found_in_a_clone_and_has_its_own_order(tmp_path: Path) -> None:
    names = [f"name {number}" for number in range(1000)]
    path = tmp_path / "data/train-00000-of-00001.parquet"
    write(path, {"image": STRUCTS, "label": LABELS}, {"label": class_label(*names)})
    source = source_of("imagenet", tmp_path)
    check(source)
    assert source.class_names[1] == "n01443537 goldfish, Carassius auratus"
    write(path, {"image": STRUCTS})
    assert "has no supported labels; set data.label_field" in refused(tmp_path, "imagenet")
    write(path, {"image": STRUCTS, "label": ["tench", "goldfish", "hen", "tench"]})
    assert "holds 'goldfish', which is none of ImageNet-1k's" in refused(tmp_path, "imagenet")


def test_a_mutated_file_is_read_or_refused_on_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", {"image": STRUCTS, "label": LABELS}, {"label": class_label("a", "b", "c")})
    data, told = path.read_bytes(), list[str]()
    for seed in range(200):
        dice, changed = random.Random(seed), bytearray(data)
        for _ in range(dice.randint(1, 3)):
            changed[dice.randrange(len(data) - 1500, len(data) - 8)] = dice.randrange(256)  # the description's part
        path.write_bytes(changed)
        try:
            source = source_of("parquet", path)
        except UserError as error:
            told.append(str(error))
            continue
        for entry in source.entries:
            try:
                source.open(entry)
            except Rejected as error:
                told.append(str(error))
    assert len(told) > 20
    assert not any("\n" in line for line in told)
