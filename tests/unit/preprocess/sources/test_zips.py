"""Zips as other systems and tools write them are read under the names that are meant, or refused by the member's."""

import io
import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import UserError
from preprocess.images.images import Rejected
from preprocess.sources import Source
from tests.photographs import source_of, write_folder, write_zip


def zip_of(path: Path, names: list[str], system: int = 3) -> Path:
    """A zip whose members have exactly these names; `system` 0 is Windows, 3 Unix."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            info = zipfile.ZipInfo(name)
            info.create_system = system
            archive.writestr(info, b"" if name.endswith(("/", "\\")) else name.encode(errors="surrogateescape"))
    return path


def read(source: Source) -> dict[str, tuple[str, bytes]]:
    return {entry.key: (source.class_names[entry.label], source.open(entry)) for entry in source.entries}


NAMES = {
    "backslashes": ["cat\\1.png", "dog\\sub\\2.png"],
    "folders with backslashes": ["cat\\", "cat\\1.png", "dog\\", "dog\\sub\\", "dog\\sub\\2.png"],
    "both slashes": ["cat/1.png", "dog\\sub/2.png"],
    "dots": ["./cat/1.png", "./dog/./sub/2.png"],
    "doubled slashes": ["cat//1.png", "dog/sub//2.png"],
}


@pytest.mark.parametrize("system", [0, 3])
@pytest.mark.parametrize("case", NAMES)
def test_members_are_read_under_the_paths_that_their_names_mean(tmp_path: Path, case: str, system: int) -> None:
    source = source_of("folder", zip_of(tmp_path / "x.zip", NAMES[case], system))
    found = read(source)
    assert {key: name for key, (name, _) in found.items()} == {"cat/1.png": "cat", "dog/sub/2.png": "dog"}
    assert found["dog/sub/2.png"][1].endswith(b"2.png")


LEADING_OUT = [
    "..\\1.png",
    "a\\..\\..\\1.png",
    "\\1.png",
    "\\\\server\\share\\1.png",
    "C:\\1.png",
    "C:/1.png",
    "c:1.png",
]
LEADING_OUT += ["../1.png", "/1.png", "a/../1.png", "./../1.png"]


@pytest.mark.parametrize("name", LEADING_OUT)
def test_a_name_that_leads_out_is_refused_with_either_slash(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"has a member .*, a path that leads out of it"):
        source_of("folder", zip_of(tmp_path / "x.zip", ["a/0.png", name]))


@pytest.mark.parametrize("names", [["a/1.png", "a\\1.png"], ["a/1.png", "./a/1.png"], ["a/1.png", "a//1.png"]])
def test_names_that_mean_one_path_are_refused(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(UserError, match=r"twice; pack it again"):
        source_of("folder", zip_of(tmp_path / "x.zip", names))


def streamed(path: Path) -> Path:
    """With data descriptors: sizes and checksums after the data, as of a zip that was written to a pipe."""

    class Pipe(io.RawIOBase):
        def __init__(self) -> None:
            self.written = bytearray()

        def writable(self) -> bool:
            return True

        def write(self, data: bytes) -> int:  # type: ignore[override]
            self.written += data
            return len(data)

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cat/1.png", b"one")
        archive.writestr("dog/2.png", b"two")
    path.write_bytes(bytes(pipe.written))
    return path


def of_64_bits(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (("cat/1.png", b"one"), ("dog/2.png", b"two")):
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(data)
    return path


def after_a_program(path: Path) -> Path:
    write_zip(path, {"cat/1.png": b"one", "dog/2.png": b"two"})
    path.write_bytes(b"MZ" + bytes(1000) + path.read_bytes())
    return path


def with_a_comment(path: Path) -> Path:
    with zipfile.ZipFile(write_zip(path, {"cat/1.png": b"one", "dog/2.png": b"two"}), "a") as archive:
        archive.comment = b"made by hand"
    return path


@pytest.mark.parametrize("make", [streamed, of_64_bits, after_a_program, with_a_comment])
def test_every_way_to_write_a_zip_is_read(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    assert read(source_of("folder", make(tmp_path / "x.zip"))) == {
        "cat/1.png": ("cat", b"one"),
        "dog/2.png": ("dog", b"two"),
    }


def test_names_in_utf_8_and_in_a_dos_code_page_are_read(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", {"Füße/1.png": b"1", "猫/2.png": b"2", "dog/3.png": b"3"})
    assert source_of("folder", path).class_names == ["Füße", "dog", "猫"]
    data = path.read_bytes().replace("Füße".encode(), b"F\x81\xe1\x65aa")  # as many bytes, in code page 437
    flags = data.index(b"PK\1\2") + 8
    assert data[flags + 1] & 8
    path.write_bytes(data[: flags + 1] + bytes([data[flags + 1] & ~8]) + data[flags + 2 :])
    source = source_of("folder", path)
    assert read(source) == {"Füßeaa/1.png": ("Füßeaa", b"1"), "dog/3.png": ("dog", b"3"), "猫/2.png": ("猫", b"2")}


def test_a_folder_in_a_zip_can_be_named(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "x.zip", ["train/cat/1.png", "train/dog/2.png", "val/cat/3.png", "README"])
    source = source_of("folder", f"{path}/train/")
    assert read(source) == {"cat/1.png": ("cat", b"train/cat/1.png"), "dog/2.png": ("dog", b"train/dog/2.png")}
    assert source.left_out == {}
    with pytest.raises(UserError, match=r"x\.zip has no folder 'test'; it has train, val$"):
        source_of("folder", f"{path}/test")
    folder = write_folder(tmp_path / "y.zip", {"cat/1.png": b"1", "dog/1.png": b"2"})  # a folder that is named so
    assert source_of("folder", folder).class_names == ["cat", "dog"]


IMAGES = ["00000/img00000000.png", "00000/img00000001.png", "00001/img00010000.png"]
FORMS = pytest.mark.parametrize("form", ["folder", "zip"])


def dataset_tool(path: Path, content: object, form: str, top: str = "") -> Path:
    """As StyleGAN's dataset_tool writes it; `content` is that of dataset.json, bytes as they are, None for no file."""
    files = {f"{top}{name}": name.encode() for name in IMAGES}
    if content is not None:
        files[f"{top}dataset.json"] = content if isinstance(content, bytes) else json.dumps(content).encode()
    return write_folder(path / "x", files) if form == "folder" else write_zip(path / "x.zip", files)


@FORMS
@pytest.mark.parametrize("top", ["", "data/"])
def test_dataset_tools_labels_are_read(tmp_path: Path, form: str, top: str) -> None:
    labels = [[name, label] for name, label in zip(IMAGES, [2, 0, 2], strict=True)]
    random.Random(0).shuffle(labels)
    source = source_of("folder", dataset_tool(tmp_path, {"labels": labels}, form, top))
    assert [(entry.key.removeprefix(top), entry.label) for entry in source.entries] == [
        (IMAGES[1], 0),
        (IMAGES[0], 2),
        (IMAGES[2], 2),
    ]
    assert source.class_names == ["0", "1", "2"]
    assert source.left_out == {"not an image: .json": 1}


@FORMS
@pytest.mark.parametrize("content", [None, {"labels": None}, {"version": 1}, [1, 2], "text"])
@pytest.mark.parametrize("kind", ["folder", "ffhq"])
def test_dataset_tools_parts_are_no_classes_without_labels(
    tmp_path: Path, content: object, form: str, kind: str
) -> None:
    source = source_of(kind, dataset_tool(tmp_path, content, form))
    assert source.class_names == ["face" if kind == "ffhq" else "x"]
    assert len(source.entries) == 3


def test_labels_of_faces_are_not_looked_at(tmp_path: Path) -> None:
    content = {"labels": [[name, [0.5] * 25] for name in IMAGES]}  # cameras
    assert source_of("ffhq", dataset_tool(tmp_path, content, "zip")).class_names == ["face"]


def test_a_dataset_json_of_something_else_leaves_folders_as_classes(tmp_path: Path) -> None:
    files = {"cat/1.png": b"", "dog/1.png": b"", "dataset.json": b'{"name": "pets"}'}
    assert source_of("folder", write_folder(tmp_path, files)).class_names == ["cat", "dog"]


BAD_LABELS = {
    "one-hot": ([0, 0, 1], r"the label \[0, 0, 1\] of '00000/img00000000\.png'; one class index"),
    "numbers": ([0.25, 0.5], r"the label \[0\.25, 0\.5\] of"),
    "a float": (1.0, r"the label 1\.0 of"),
    "a long vector": ([0.125] * 25, r"the label \[0\.125, .*\.\.\.\] of"),
    "text": ("cat", "the label 'cat' of"),
    "true": (True, "the label True of"),
    "null": (None, "the label None of"),
    "below 0": (-1, "the label -1 of"),
    "far too large": (10**9, "the label 1000000000 of"),
}


@FORMS
@pytest.mark.parametrize("case", BAD_LABELS)
def test_a_label_that_is_no_class_index_is_refused_by_name(tmp_path: Path, case: str, form: str) -> None:
    label, told = BAD_LABELS[case]
    content = {"labels": [[name, label] for name in IMAGES]}
    with pytest.raises(UserError, match=rf"dataset\.json has {told}"):
        source_of("folder", dataset_tool(tmp_path, content, form))


BAD_FILES = {
    "no label of an image": ({"labels": [[name, 0] for name in IMAGES[1:]]}, r"no label of '00000/img00000000\.png'"),
    "a label of no image": (
        {"labels": [[name, 0] for name in [*IMAGES, "00002/img00020000.png"]]},
        r"labels of 1 images that are not there \('00002/img00020000\.png'\); complete them",
    ),
    "two labels": ({"labels": [[IMAGES[0], 0], [IMAGES[0], 1]]}, "two labels of '00000/img00000000.png'"),
    "no pairs": ({"labels": ["cat", "dog"]}, "'cat' among its labels"),
    "triples": ({"labels": [[IMAGES[0], 0, 1]]}, "among its labels"),
    "an empty list": ({"labels": []}, "no label of"),
    "an object": ({"labels": {"cat": 0}}, r"\{'cat': 0\} for its labels"),
    "no JSON": (b"{", "cannot be read; mend it, .*Expecting"),
    "no text": (b"\xff\xfe\x00", "cannot be read"),
    "deep nesting": (b"[" * 100_000, "cannot be read"),
    "a number of 5,000 digits": (b'{"labels": ' + b"9" * 5000 + b"}", "cannot be read"),
}


@FORMS
@pytest.mark.parametrize("case", BAD_FILES)
def test_labels_that_do_not_fit_the_images_are_refused(tmp_path: Path, case: str, form: str) -> None:
    content, told = BAD_FILES[case]
    with pytest.raises(UserError, match=told) as found:
        source_of("folder", dataset_tool(tmp_path, content, form))
    assert "\n" not in str(found.value)


def test_damage_anywhere_in_a_zip_is_one_line(tmp_path: Path) -> None:
    """Each byte of the directory, and every seventh of the rest, flipped: refused, rejected, or read all the same."""
    path = write_zip(tmp_path / "x.zip", {"cat/1.png": b"one" * 9, "dog/2.png": b"two" * 9}, zipfile.ZIP_DEFLATED)
    data, told = path.read_bytes(), list[str]()
    for position in [*range(0, 100, 7), *range(data.index(b"PK\1\2"), len(data))]:
        for mask in (0xFF, 0x01):
            path.write_bytes(data[:position] + bytes([data[position] ^ mask]) + data[position + 1 :])
            try:
                read(source_of("folder", path))
            except (UserError, Rejected) as error:
                told.append(str(error))
    assert len(told) > 50
    assert not any("\n" in line for line in told)
