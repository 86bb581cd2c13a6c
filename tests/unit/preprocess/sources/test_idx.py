"""IDX files, MNIST's form: every image under its label, and headers that contradict the files are refused."""

import gzip
import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from preprocess.images.images import decode
from tests.photographs import idx_bytes, source_of, write_folder

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 6, 4), np.uint8)
LABELS = np.array([3, 0, 1, 3, 9], np.uint8)
IMAGES, OF_LABELS = idx_bytes(PIXELS), idx_bytes(LABELS)
FORMS = {
    "gzip": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "unpacked": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
    "as archivers name them": ("train-images.idx3-ubyte", "train-labels.idx1-ubyte"),
    "one packed": ("x-images-idx3-ubyte.gz", "x-labels-idx1-ubyte"),
    "the other packed": ("images-idx3-ubyte", "labels-idx1-ubyte.gz"),
}


def pack(name: str, data: bytes) -> bytes:
    return gzip.compress(data, 1) if name.endswith(".gz") else data


def split(folder: Path, form: str = "gzip", images: bytes = IMAGES, labels: bytes = OF_LABELS) -> Path:
    """Writes a split; its file of images."""
    contents = dict(zip(FORMS[form], (images, labels), strict=True))
    return write_folder(folder, {name: pack(name, data) for name, data in contents.items()}) / FORMS[form][0]


@pytest.mark.parametrize("named", ["file", "folder"])
@pytest.mark.parametrize("form", FORMS)
def test_each_image_of_idx_files_is_grey_in_three_channels_under_its_label(
    tmp_path: Path, form: str, named: str
) -> None:
    file = split(tmp_path / "x", form)
    source = source_of("idx", file if named == "file" else file.parent)
    entries = list(source.entries)
    random.Random(0).shuffle(entries)
    for entry in entries:
        number = int(entry.key.removeprefix(f"{FORMS[form][0].removesuffix('.gz')}/"))
        assert entry.label == LABELS[number]
        assert len(source.open(entry)) == entry.size
        read = np.asarray(decode(source.open(entry)))  # (H, W, 3)
        assert np.array_equal(read, np.repeat(PIXELS[number][..., None], 3, axis=2))
    assert len(entries) == 5
    assert source.class_names == [str(label) for label in range(10)]
    assert not source.left_out


def test_all_files_beside_idx_files_are_counted(tmp_path: Path) -> None:
    split(tmp_path)
    write_folder(tmp_path, {"README.md": b"", ".DS_Store": b"", "more/notes": b"", "__MACOSX/._x": b"", "1.png": b""})
    write_folder(tmp_path, {"train-labels-idx1-ubyte": b"unpacked beside the packed ones"})
    expected = {"not an image: .md": 1, "hidden": 1, "not an image: no suffix": 2, "not an image: .png": 1}
    assert source_of("idx", tmp_path).left_out == expected | {"hidden folder, not looked into": 1}


def splits(folder: Path) -> Path:
    split(folder, "gzip")
    return split(folder, "unpacked").parent


def header(*shape: int, magic: bytes = b"\0\0\x08\x03") -> bytes:
    return magic + struct.pack(f">{len(shape)}I", *shape)


def bomb(folder: Path) -> Path:
    """A header of five images, and a gigabyte of zeros, which gzip makes a megabyte."""
    file = split(folder)
    file.write_bytes(gzip.compress(IMAGES + bytes(2**24), 9) + gzip.compress(bytes(2**24), 9) * 60)
    return file


def cut(folder: Path) -> Path:
    file = split(folder)
    file.write_bytes(file.read_bytes()[:-20])
    return file


def without(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        file = split(folder)
        (folder / name).unlink()
        return file

    return make


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing": (lambda f: f / "fashion-mnist", "is not there; .*apt-get install dataset-fashion-mnist"),
    "a folder without images": (
        lambda f: write_folder(f, {"x": b""}),
        "holds no IDX file of images, such as train-images-idx3-ubyte",
    ),
    "two splits": (splits, r"several files of images \(.*/t10k-images-idx3-ubyte, .*\.gz\); name one"),
    "labels as images": (lambda f: split(f).with_name(FORMS["gzip"][1]), "is not named as IDX images are"),
    "no labels": (without("train-labels-idx1-ubyte.gz"), "has no labels beside it, in train-labels-idx1-ubyte.gz"),
    "nothing in it": (lambda f: split(f, "unpacked", b""), "ends in its header, after 0 bytes"),
    "half a header": (lambda f: split(f, images=IMAGES[:11]), "ends in its header, after 11 bytes"),
    "another kind of file": (lambda f: split(f, images=b"GIF89a" * 9), "begins with 47 49 46 38; IDX images of bytes"),
    "floats": (lambda f: split(f, images=header(5, 6, 4, magic=b"\0\0\x0d\x03")), "begins with 00 00 0d 03"),
    "labels in the place of images": (lambda f: split(f, images=OF_LABELS + bytes(9)), "begins with 00 00 08 01"),
    "images in the place of labels": (lambda f: split(f, labels=IMAGES), "begins with 00 00 08 03; IDX labels"),
    "colours": (lambda f: split(f, images=header(5, 6, 4, 3, magic=b"\0\0\x08\x04")), "begins with 00 00 08 04"),
    "a pixel too few": (lambda f: split(f, "unpacked", IMAGES[:-1]), "5 x 6 x 4 = 120 bytes and holds 119; download"),
    "a pixel too many": (lambda f: split(f, images=IMAGES + b"0"), "5 x 6 x 4 = 120 bytes and holds more; download"),
    "all numbers at their most": (lambda f: split(f, images=header(*[2**32 - 1] * 3)), "more than 1,073,741,824"),
    "images of no pixel": (lambda f: split(f, images=header(5, 0, 4)), "has 5 x 0 x 4 pixels, no images"),
    "no image": (lambda f: split(f, images=header(0, 6, 4), labels=OF_LABELS[:4] + bytes(4)), "has 0 x 6 x 4 pixels"),
    "a label too few": (
        lambda f: split(f, labels=OF_LABELS[:7] + b"\4" + OF_LABELS[8:-1]),
        "has 5 images and .*train-labels-idx1-ubyte.gz 4 labels",
    ),
    "a gzip bomb": (bomb, "5 x 6 x 4 = 120 bytes and holds more"),
    "gzip that is cut off": (cut, "cannot be read; download it again"),
    "Git LFS's note": (lambda f: split(f, "unpacked", b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "a folder in the place of labels": (
        lambda f: write_folder(without("train-labels-idx1-ubyte.gz")(f).parent, {"train-labels-idx1-ubyte.gz/x": b""}),
        "has no labels beside it",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_idx_files_that_contradict_themselves_are_refused_with_one_line(tmp_path: Path, case: str) -> None:
    make, told = REFUSED[case]
    with pytest.raises(UserError, match=told) as found:
        source_of("idx", make(tmp_path))
    assert str(found.value).startswith("data.images: ")


def test_no_more_is_unpacked_than_the_header_announces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, asked = bomb(tmp_path), []
    read = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, size=-1: (asked.append(size), read(self, size))[1])
    with pytest.raises(UserError, match="holds more"):
        source_of("idx", file)
    assert asked == [16, 121]
