"""A WebDataset gives every image under its label, wherever the label stands, or is refused with what it found."""

import json
from pathlib import Path

import pytest

from common.errors import UserError
from preprocess.sources import Source
from tests.photographs import source_of, tar_bytes, write_folder
from tests.planted import JPEG, PNG

COUNT = 5


def write(path: Path, samples: list[dict[str, bytes]], prefix: str = "") -> Path:
    """A tar of samples: sample i's members are `i.<field>`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    members = {f"{prefix}{i:03d}.{field}": data for i, sample in enumerate(samples) for field, data in sample.items()}
    path.write_bytes(tar_bytes(members))
    return path


def opened(folder: Path, samples: list[dict[str, bytes]], **options: str) -> Source:
    return source_of("webdataset", write(folder / "x.tar", samples), **options)


def refused(path: object, **options: str) -> str:
    with pytest.raises(UserError) as found:
        source_of("webdataset", path, **options)
    message = str(found.value)
    assert message.startswith("data.")
    assert "\n" not in message
    return message


def labels(source: Source) -> list[int]:
    return [entry.label for entry in source.entries]


def members(samples: list[dict[str, bytes]]) -> int:
    return sum(map(len, samples))


TEXTS = ["cls", "cls.txt", "label", "label.txt", "class", "class.txt", "CLS", "target", "y", "class_id"]
IN_JSON = [
    "label",
    "cls",
    "class",
    "class_id",
    "class_index",
    "Label",
    "label_idx",
    "category_id",
    "y",
    "target",
    "labels",
]


@pytest.mark.parametrize("field", TEXTS)
@pytest.mark.parametrize("text", ["{}", "{}\n", " {} \r\n", "0{}"])
def test_labels_are_read_from_text(tmp_path: Path, field: str, text: str) -> None:
    samples = [{"jpg": JPEG, field: text.format(i % 3).encode()} for i in range(COUNT)]
    source = opened(tmp_path, samples)
    assert (labels(source), source.class_names, source.left_out) == ([0, 1, 2, 0, 1], ["0", "1", "2"], {})


@pytest.mark.parametrize("field", IN_JSON)
@pytest.mark.parametrize("nested", [False, True])
def test_labels_are_read_from_json(tmp_path: Path, field: str, nested: bool) -> None:
    if nested and field == "y":
        return  # a coordinate, as likely as not
    samples = []
    for i in range(COUNT):
        content = {"width": 9, "meta": {field: i % 3}} if nested else {"id": i, field: i % 3, "width": 9}
        samples.append({"jpg": JPEG, "json": json.dumps(content).encode()})
    source = opened(tmp_path, samples)
    assert (labels(source), source.class_names, source.left_out) == ([0, 1, 2, 0, 1], ["0", "1", "2"], {})


@pytest.mark.parametrize("where", ["cls", "json", "json as text"])
def test_names_are_classes_in_their_order(tmp_path: Path, where: str) -> None:
    names = ["dog", "cat", "dog", "n01440764", "cat"]
    samples = [
        {"jpg": JPEG, "cls": name.encode()}
        if where == "cls"
        else {"jpg": JPEG, "json": json.dumps({"label": name}).encode()}
        for name in names
    ]
    source = opened(tmp_path, samples)
    assert (labels(source), source.class_names) == ([1, 0, 1, 2, 0], ["cat", "dog", "n01440764"])


def test_names_beside_numbers_name_the_classes(tmp_path: Path) -> None:
    samples = [
        {
            "jpg": JPEG,
            "cls": str(label).encode(),
            "json": json.dumps({"label": label, "class_name": f"<{label}>"}).encode(),
        }
        for label in (3, 0, 3, 1)
    ]
    source = opened(tmp_path, samples)
    assert (labels(source), source.class_names) == ([3, 0, 3, 1], ["<0>", "<1>", "2", "<3>"])


@pytest.mark.parametrize("place", ["wds/test", "wds"])
def test_class_names_are_read_from_the_list_beside_the_tars(tmp_path: Path, place: str) -> None:
    write(tmp_path / "wds/test/0.tar", [{"webp": JPEG, "cls": b"1"}, {"webp": JPEG, "cls": b"0"}])
    write_folder(tmp_path, {f"{place}/classnames.txt": b"cat\ndog\nowl\n", "wds/test/nshards.txt": b"1"})
    source = source_of("webdataset", tmp_path / "wds/test")
    assert (labels(source), source.class_names) == ([1, 0], ["cat", "dog", "owl"])
    (tmp_path / place / "classnames.txt").write_text("cat")
    assert "has the label 1 (cls) and 1 class names" in refused(tmp_path / "wds/test")


def two(first: object, second: object) -> list[dict[str, bytes]]:
    """Samples with `.cls` from one list and a JSON label from another."""
    return [
        {"jpg": JPEG, "cls": str(a).encode(), "json": json.dumps({"label": b}).encode()}
        for a, b in zip(first, second, strict=True)
    ]


def test_several_labels_must_agree_or_one_is_chosen(tmp_path: Path) -> None:
    assert labels(opened(tmp_path, two([0, 2, 1], [0, 2, 1]))) == [0, 2, 1]
    path = write(tmp_path / "x.tar", two([0, 2, 1], [0, 2, 5]))
    message = refused(path)
    assert "1 (cls) and 5 (json:label) at x.tar/002.jpg" in message
    assert "set data.label_field to the one that labels the images, or to none" in message
    assert labels(source_of("webdataset", path, label_field="cls")) == [0, 2, 1]
    chosen = source_of("webdataset", path, label_field="json:label")
    assert (labels(chosen), chosen.left_out) == ([0, 2, 5], {"not an image: .cls": 3})
    none = source_of("webdataset", path, label_field="none")
    assert (labels(none), none.left_out.total()) == ([0, 0, 0], 6)
    assert "contradict" not in message


@pytest.mark.parametrize(
    ("fields", "ok"), [({"class": "cat", "label": 1}, True), ({"fine_label": 1, "coarse_label": 0}, False)]
)
def test_several_fields_of_one_description_must_agree(tmp_path: Path, fields: dict[str, object], ok: bool) -> None:
    path = write(tmp_path / "x.tar", [{"jpg": JPEG, "json": json.dumps(fields).encode()}] * 2)
    if ok:
        assert source_of("webdataset", path).class_names == ["0", "cat"]
    else:
        assert "several labels that do not agree" in refused(path)
        assert labels(source_of("webdataset", path, label_field="json:coarse_label")) == [0, 0]


BAD_LABELS: dict[str, tuple[dict[str, bytes], str]] = {
    "a float": ({"cls": b"1.0"}, "no class index and no name"),
    "a float in json": ({"json": b'{"label": 1.0}'}, "no class index and no name"),
    "nan": ({"json": b'{"label": NaN}'}, "no class index and no name"),
    "infinity": ({"json": b'{"label": 1e999}'}, "no class index and no name"),
    "a list": ({"json": b'{"label": [1, 2]}'}, "no class index and no name"),
    "an object of objects": ({"json": b'{"label": {"label": {"label": {"id": 1}}}}'}, "no class index and no name"),
    "nothing": ({"cls": b" \n"}, "no class index and no name"),
    "null": ({"json": b'{"label": null}'}, "for 0 of 1 images"),
    "several lines": ({"cls": b"cat\ndog"}, "no class index and no name"),
    "bytes": ({"cls": b"\xff\xfe\x00"}, "is no label"),
    "a page": ({"cls": b"<html>" * 999}, "is no label"),
    "below zero": ({"cls": b"-1"}, r"has the label -1 \(cls\), no class index; name a labelled split"),
    "a hash": ({"json": b'{"label": 123456789012345678901234567890}'}, "has the label 123456789012345678901234567890"),
    "a number of 5,000 digits": ({"json": b'{"label": ' + b"9" * 5000 + b"}"}, "is not valid JSON"),
    "a number of 20 digits": ({"cls": b"9" * 20}, "no class index and no name"),
    "a key twice": ({"json": b'{"label": 1, "label": 2}'}, "a key twice"),
    "a list of labels": ({"json": b"[1]"}, "in place of an object"),
    "a bare number": ({"json": b"1"}, "in place of an object"),
    "half an object": ({"json": b'{"label": 1'}, "is not valid JSON"),
    "no text": ({"json": b"\xff\xfe\x00"}, "is not valid JSON"),
    "an empty description": ({"json": b""}, "is not valid JSON"),
    "brackets without end": ({"json": b"[" * 200_000}, "is not valid JSON"),
    "braces without end": ({"json": b'{"a":' * 200_000}, "is not valid JSON"),
    "an array": ({"cls.npy": b"\x93NUMPY"}, r"\.cls\.npy \(not read\) may be one"),
    "a pickle": ({"pyd": b"\x80\x04."}, r"\.pyd \(a pickle, which is never read\) may"),
    "a pickled label": ({"label.pkl": b"\x80\x04."}, r"\.label\.pkl \(a pickle"),
    "a tensor": ({"pth": b"PK"}, r"\.pth \(a pickle"),
    "a number in a caption": ({"txt": b"3\n"}, r"\.txt \('3'\) may be one"),
    "a number in an index": ({"index": b"3"}, r"\.index \('3'\) may be one"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_unsupported_labels_never_become_one_class(tmp_path: Path, case: str) -> None:
    fields, reason = BAD_LABELS[case]
    path = write(tmp_path / "x.tar", [{"jpg": JPEG, **fields}])
    with pytest.raises(UserError, match=reason) as found:
        source_of("webdataset", path)
    assert "data.label_field" in str(found.value)
    assert "num_classes" not in str(found.value)
    assert len(str(found.value)) < 600
    source = source_of("webdataset", path, label_field="none")
    assert (labels(source), source.class_names, source.left_out.total()) == ([0], ["x"], len(fields))


def test_a_part_without_labels_is_refused(tmp_path: Path) -> None:
    samples = [{"jpg": JPEG, "json": b'{"label": 1}'}, {"jpg": JPEG, "json": b'{"caption": "x"}'}, {"jpg": JPEG}]
    message = refused(write(tmp_path / "x.tar", samples))
    assert "labels (json:label) for 1 of 3 images, not for x.tar/001.jpg; label all of them or none" in message


UNLABELLED: dict[str, tuple[dict[str, bytes], str]] = {
    "captions": ({"txt": b"a cat"}, "caption (.txt)"),
    "img2dataset's descriptions": (
        {"json": b'{"caption": "a cat", "x": 1, "y": 2}'},
        "description without a label that is read (.json)",
    ),
    "boxes": ({"json": b'{"box": {"x": 1, "y": 2}}'}, "description without a label that is read (.json)"),
    "latents": ({"npy": b"\x93NUMPY" + bytes(99)}, "not an image: .npy"),
}


@pytest.mark.parametrize("case", UNLABELLED)
def test_samples_without_labels_are_one_class_and_the_plan_lists_their_fields(tmp_path: Path, case: str) -> None:
    fields, reason = UNLABELLED[case]
    source = opened(tmp_path, [{"jpg": JPEG, **fields}] * COUNT)
    assert (labels(source), source.class_names, source.left_out) == ([0] * COUNT, ["x"], {reason: COUNT})


def test_label_field_chooses_any_field(tmp_path: Path) -> None:
    samples = [{"jpg": JPEG, "txt": b"dog", "meta.json": b'{"a": {"b": 4}}', "index": b"7"}] * 2
    path = write(tmp_path / "x.tar", samples)
    assert source_of("webdataset", path, label_field="txt").class_names == ["dog"]
    assert labels(source_of("webdataset", path, label_field="index")) == [7, 7]
    assert labels(source_of("webdataset", path, label_field="meta.json:a.b")) == [4, 4]
    assert "has no json:label in its samples" in refused(path, label_field="json:label")


@pytest.mark.parametrize("beside", ["seg.png", "mask.png", "thumb.jpg", "depth.webp"])
def test_masks_and_thumbnails_beside_an_image_are_no_images(tmp_path: Path, beside: str) -> None:
    samples = [{beside: PNG, "JPG" if i else "png": JPEG, "cls": b"0"} for i in range(COUNT)]
    source = opened(tmp_path, samples)
    assert all(source.open(entry) == JPEG for entry in source.entries)
    assert (len(source.entries), source.left_out) == (COUNT, {f"image beside the sample's own (.{beside})": COUNT})


def test_one_compound_field_is_the_image_and_of_several_one_is_to_be_named(tmp_path: Path) -> None:
    source = opened(tmp_path, [{"image.jpg": JPEG, "cls": b"0"}] * COUNT)
    assert ([source.open(entry) for entry in source.entries], source.left_out) == ([JPEG] * COUNT, {})
    path = write(tmp_path / "x.tar", [{"image.jpg": JPEG, "mask.png": PNG, "cls": b"0"}] * COUNT)
    assert "set data.image_field to the one that holds the images: image.jpg, mask.png" in refused(path)
    source = source_of("webdataset", path, image_field="image.jpg")
    assert ([source.open(entry) for entry in source.entries], source.left_out.total()) == ([JPEG] * COUNT, COUNT)


def test_a_sample_with_a_mask_alone_is_not_trained_on(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", [{"jpg": JPEG}, {"seg.png": PNG}])
    assert "x.tar: 001.seg.png is an image without a simple field" in refused(path)
    source = source_of("webdataset", path, image_field="jpg")
    assert (len(source.entries), source.left_out) == (1, {"in a sample without an image: .png": 1})


def test_two_images_of_one_sample_need_a_choice(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", [{"jpg": JPEG, "png": PNG}] * 2)
    assert "set data.image_field=jpg" in refused(path)
    source = source_of("webdataset", path, image_field="png")
    assert [source.open(entry) for entry in source.entries] == [PNG] * 2
    assert "no images of data.image_field=webp" in refused(path, image_field="webp")


def test_every_member_and_every_file_is_taken_or_counted(tmp_path: Path) -> None:
    samples = [
        {"jpg": JPEG, "cls": b"0", "txt": b"a", "json": b"{}", "seg.png": PNG},
        {"png": PNG, "cls": b"1", "npy": b"x", "json": b"{}"},
        {"mp4": b"x", "cls": b"2", "json": b"{}"},
    ]
    write(tmp_path / "train-0.tar", samples, "a/")
    write(tmp_path / "train-1.tar", samples, "./b/")
    beside = {
        "index.json": b"{}",
        "_info.json": b"{}",
        "train-0.idx": b"",
        "train-0_stats.json": b"{}",
        ".cache/x.tar": b"",
    }
    write_folder(tmp_path, beside)
    source = source_of("webdataset", tmp_path)
    assert labels(source) == [0, 1, 0, 1]
    read = 4  # .cls
    assert len(source.entries) + read + source.left_out.total() == 2 * members(samples) + len(beside)
    assert source.left_out == {
        "caption (.txt)": 2,
        "description without a label that is read (.json)": 4,
        "image beside the sample's own (.seg.png)": 2,
        "not an image: .npy": 2,
        "in a sample without an image: .mp4": 2,
        "in a sample without an image: .cls": 2,
        "in a sample without an image: .json": 2,
        "not an image: .json": 3,
        "not an image: .idx": 1,
        "hidden folder, not looked into": 1,
    }


SPLITS = {
    "imagenet-1k-wds": ("imagenet1k-train-{}.tar", "imagenet1k-validation-{}.tar", "imagenet1k-train-*.tar"),
    "folders": ("train/{}.tar", "validation/{}.tar", "train/*.tar"),
    "val": ("cc3m_train_{}.tar", "cc3m_val_{}.tar", "cc3m_train_*.tar"),
    "dev": ("data/x-train-{}.tar", "data/x-dev-{}.tar", "data/x-train-*.tar"),
    "parts": ("train-{}-of-0002.tar", "unlabeled-{}-of-0002.tar", "train-*-of-0002.tar"),
    "configurations": ("fine/{}.tar", "coarse/{}.tar", "coarse/*.tar"),
    "resolutions": ("64/{}.tar", "512/{}.tar", "512/*.tar"),
}


@pytest.mark.parametrize("layout", SPLITS)
def test_splits_and_configurations_merge_only_where_braces_say_so(tmp_path: Path, layout: str) -> None:
    first, second, pattern = SPLITS[layout]
    for number in range(2):
        for form in (first, second):
            write(tmp_path / form.format(f"{number:04d}"), [{"jpg": JPEG, "cls": b"0"}], form[0])
    for path in (tmp_path, f"{tmp_path}/**/*.tar"):
        message = refused(path)
        assert "2 sets of files that must not merge unnoticed" in message
        assert message.endswith(f"list in braces what is meant together, or name one, as {tmp_path}/{pattern}")
    named = message.rpartition("name one, as ")[2]
    assert len(source_of("webdataset", named).entries) == 2
    both = f"{{{tmp_path}/{first.format('*')},{tmp_path}/{second.format('*')}}}"
    assert len({entry.key for entry in source_of("webdataset", both).entries}) == 4


@pytest.mark.parametrize("names", [["cat.tar", "dog.tar"], ["a-0.tar", "a-1.tar"], ["a.tar", "latrine.tar"]])
def test_shards_of_one_set_are_read_together_under_keys_of_their_own(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        write(tmp_path / name, [{"jpg": JPEG}])
    assert [entry.key for entry in source_of("webdataset", tmp_path).entries] == [f"{name}/000.jpg" for name in names]


def test_a_split_that_lacks_parts_by_its_names_is_refused(tmp_path: Path) -> None:
    for number in (0, 2):
        write(tmp_path / f"train-{number:05d}-of-00003.tar", [{"jpg": JPEG}])
    for path in (tmp_path, tmp_path / "train-*.tar"):
        assert "has 0 files of part 1 of 00003" in refused(path)
    chosen = source_of("webdataset", tmp_path / "train-{00000,00002}-of-00003.tar")
    assert len(chosen.entries) == 2


BAD_PATHS = {
    "nowhere.tar": "is not there or holds no .tar",
    "x-{0..3}.tar": "x-1.tar is not there",
    "x-{0..3.tar": "has unbalanced braces",
    "x-{0..99999999}.tar": "means more than 1,000,000 files",
    "{x-0,x-0}.tar": "twice",
    "pipe:cat x-0.tar": "begins with a scheme",
    "gs://bucket/x-0.tar": "begins with a scheme",
    "hf://datasets/a/b/x.tar": "begins with a scheme",
    "empty": "holds no .tar; name where",
    "others": r"holds no .tar \(2 not an image: .zip, 1 not an image: .md\)",
    "linked": "is a symbolic link to a folder",
}


@pytest.mark.parametrize("path", BAD_PATHS)
def test_a_path_without_tars_is_one_line(tmp_path: Path, path: str) -> None:
    write(tmp_path / "x-0.tar", [{"jpg": JPEG}])
    write_folder(tmp_path, {"others/a.zip": b"", "others/b.zip": b"", "others/README.md": b""})
    (tmp_path / "empty").mkdir()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/more").symlink_to(tmp_path / "others")
    with pytest.raises(UserError, match=BAD_PATHS[path]) as found:
        source_of("webdataset", path if ":" in path else f"{tmp_path}/{path}")
    assert "\n" not in str(found.value)


def test_a_thousand_shards_leave_no_file_open(tmp_path: Path) -> None:
    data = tar_bytes({"0.jpg": b"x", "0.cls": b"0"})
    for number in range(1000):
        (tmp_path / f"x-{number:04d}.tar").write_bytes(data)
    before = len(list(Path("/proc/self/fd").iterdir()))
    source = source_of("webdataset", tmp_path)
    assert source.open(source.entries[999]) == b"x"
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
