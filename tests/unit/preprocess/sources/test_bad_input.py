"""Bad inputs, far over forty: each is accepted by its rule or rejected by name; none ends the program, none passes
silently. `test_hostile_input.py` has those that are made to harm, and encodes all the images."""

import os
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from preprocess.images.images import Rejected, decode
from tests.photographs import photographs, source_of, tar_bytes, write_folder, write_lmdb, write_parquet, write_zip
from tests.planted import ACCEPTED_IMAGES, JPEG, PNG, REJECTED_IMAGES, flipped


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case", REJECTED_IMAGES)
def test_a_bad_image_is_rejected_with_its_reason_on_one_line(case: str) -> None:
    data, reason = REJECTED_IMAGES[case]
    with pytest.raises(Rejected, match=reason) as found:
        decode(data)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("case", ACCEPTED_IMAGES)
def test_an_odd_image_is_accepted_by_its_rule(case: str) -> None:
    data, pixels = ACCEPTED_IMAGES[case]
    assert np.array_equal(np.asarray(decode(data)), pixels)


def tar_file(path: Path, files: dict[str, bytes], *members: tarfile.TarInfo) -> Path:
    path.write_bytes(tar_bytes(files, *members))
    return path


def link(kind: bytes, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo("link.jpg")
    member.type, member.linkname = kind, target
    return member


def zip_with(path: Path, info: zipfile.ZipInfo, data: bytes = JPEG, times: int = 1) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jpg", JPEG)
        for _ in range(times):
            archive.writestr(info, data)
    return path


def zip_link(path: Path) -> Path:
    info = zipfile.ZipInfo("link.jpg")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return zip_with(path, info, b"/etc/passwd")


def zip_method(path: Path) -> Path:
    return write_zip(path, {"a.jpg": JPEG}, zipfile.ZIP_BZIP2)


def cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def damaged_tar_header(folder: Path) -> Path:
    path = tar_file(folder / "x.tar", {"0.jpg": JPEG, "1.jpg": JPEG})
    second = 512 + -(-len(JPEG) // 512) * 512
    path.write_bytes(flipped(path.read_bytes(), second + 10))
    return path


def link_loop(folder: Path) -> Path:
    write_folder(folder, {"a/0.jpg": JPEG})
    (folder / "a/loop").symlink_to(folder / "a")
    return folder


def pipe(folder: Path) -> Path:
    write_folder(folder, {"a/0.jpg": JPEG})
    os.mkfifo(folder / "a/1.jpg")
    return folder


def unlabelled_test_split(folder: Path) -> Path:
    return write_parquet(folder / "test.parquet", [JPEG, JPEG], [0, -1], None)


def several_splits(folder: Path) -> Path:
    for split in ("train", "test"):
        write_parquet(folder / f"{split}-00000-of-00001.parquet", [JPEG], [0], None)
    return folder


def partly_labelled(folder: Path) -> Path:
    return tar_file(folder / "x.tar", {"0.jpg": JPEG, "0.cls": b"0", "1.jpg": JPEG})


Place = Callable[[Path], object]
# A whole source: how it is made in a folder, data.source, and what the error says.
REFUSED_SOURCES: dict[str, tuple[Place, str, str]] = {
    "a tar with a path that leaves": (
        lambda f: tar_file(f / "x.tar", {"../../0.jpg": JPEG}),
        "webdataset",
        "leads out",
    ),
    "a tar with an absolute path": (lambda f: tar_file(f / "x.tar", {"/tmp/0.jpg": JPEG}), "webdataset", "leads out"),
    "a tar with a symbolic link": (
        lambda f: tar_file(f / "x.tar", {"0.jpg": JPEG}, link(tarfile.SYMTYPE, "/etc/passwd")),
        "webdataset",
        "'link.jpg' that is a symbolic link",
    ),
    "a tar with a hard link": (
        lambda f: tar_file(f / "x.tar", {"0.jpg": JPEG}, link(tarfile.LNKTYPE, "0.jpg")),
        "webdataset",
        "'link.jpg' that is a hard link",
    ),
    "a tar with a device": (
        lambda f: tar_file(f / "x.tar", {"0.jpg": JPEG}, link(tarfile.CHRTYPE, "")),
        "webdataset",
        "no regular file",
    ),
    "a tar with duplicate keys": (
        lambda f: tar_file(f / "x.tar", {"0.jpg": JPEG}, tarfile.TarInfo("0.jpg")),
        "webdataset",
        r"two members '0\.jpg'",
    ),
    "a sample with two images": (
        lambda f: tar_file(f / "x.tar", {"0.jpg": JPEG, "0.png": PNG}),
        "webdataset",
        r"two images of one sample, .*data\.image_field=jpg",
    ),
    "a webdataset that is labelled in part": (partly_labelled, "webdataset", "label all of them or none"),
    "a class that is half a number": (
        lambda f: tar_file(f / "x.tar", {"0.jpg": JPEG, "0.cls": b"3.5"}),
        "webdataset",
        r"0\.cls is no label; .*'3\.5', which is no class index and no name",
    ),
    "a tar cut off in an image": (
        lambda f: cut(tar_file(f / "x.tar", {"0.jpg": JPEG}), 0.15),
        "webdataset",
        "1,523 bytes, of 1,024 that are left: damaged or cut off",
    ),
    "a tar without its end": (
        lambda f: cut(tar_file(f / "x.tar", {"0.jpg": JPEG[:512]}), 1024 / 10240),
        "webdataset",
        "ends at byte 1,024 without a tar's end mark",
    ),
    "a tar with a damaged header": (
        damaged_tar_header,
        "webdataset",
        "is damaged at byte 2,048, where a member's header",
    ),
    "a compressed tar": (
        lambda f: (f / "x.tar").write_bytes(b"\x1f\x8b\x08" + bytes(600)),
        "webdataset",
        r"is compressed \(gzip\).*unpack the gzip",
    ),
    "a command in place of a path": (lambda f: "pipe:cat x.tar", "webdataset", "begins with a scheme"),
    "an address in place of a path": (lambda f: "https://example.org/x.tar", "webdataset", "begins with a scheme"),
    "a zip with a path that leaves": (lambda f: write_zip(f / "x.zip", {"../0.jpg": JPEG}), "ffhq", "leads out"),
    "a zip with an absolute path": (lambda f: write_zip(f / "x.zip", {"/0.jpg": JPEG}), "ffhq", "leads out"),
    "a zip with a symbolic link": (lambda f: zip_link(f / "x.zip"), "ffhq", "symbolic link"),
    "a zip with duplicate keys": (
        lambda f: zip_with(f / "x.zip", zipfile.ZipInfo("a.jpg")),
        "celebahq",
        r"'a\.jpg' twice",
    ),
    "a zip of another compression": (lambda f: zip_method(f / "x.zip"), "ffhq", "only deflate is read"),
    "a zip cut off": (lambda f: cut(write_zip(f / "x.zip", {"a.jpg": JPEG}), 0.7), "ffhq", "not a complete zip"),
    "a zip of an LMDB": (lambda f: write_zip(f / "x.zip", {"church/data.mdb": b"0"}), "lsun", "unzip it"),
    "an LMDB cut off": (
        lambda f: cut(write_lmdb(f / "x", dict(zip("abcdefgh", photographs(8), strict=True))) / "data.mdb", 0.5),
        "lsun",
        "cut off; download it again",
    ),
    "an LMDB that is none": (lambda f: write_folder(f, {"data.mdb": b"no database" * 999}), "lsun", "is not an LMDB"),
    "an LMDB without entries": (lambda f: write_lmdb(f / "x", {}), "lsun", "LMDB without images"),
    "a parquet cut off": (
        lambda f: cut(write_parquet(f / "x.parquet", [JPEG], [0], None), 0.6),
        "parquet",
        "not a complete parquet file",
    ),
    "a parquet split without labels": (
        unlabelled_test_split,
        "parquet",
        r"test\.parquet/000001 has the label -1 .*labelled split",
    ),
    "a folder of several splits": (
        several_splits,
        "parquet",
        r"2 sets of files .*: test-\*-of-.*, or name one, as .*/train-\*-of-00001\.parquet",
    ),
    "a loop of symbolic links": (link_loop, "folder", "symbolic link"),
    "a pipe among the images": (pipe, "folder", r"a/1\.jpg is no regular file"),
    "folders that are no wnids": (lambda f: write_folder(f, {"cat/0.jpg": JPEG}), "imagenet", "none of ImageNet-1k's"),
    "a tar that is not ILSVRC's": (
        lambda f: tar_file(f / "x.tar", {"cat.tar": tar_bytes({"0.jpg": JPEG})}),
        "imagenet",
        "'cat', which is none of",
    ),
    "nothing at all": (lambda f: f / "nowhere", "celebahq", "is not there"),
}


@pytest.mark.parametrize("case", REFUSED_SOURCES)
def test_a_bad_source_is_refused_with_one_line(case: str, tmp_path: Path) -> None:
    make, source, reason = REFUSED_SOURCES[case]
    path = make(tmp_path)
    path = path if isinstance(path, Path | str) else tmp_path / "x.tar"
    with pytest.raises(UserError, match=reason) as found:
        source_of(source, path)
    assert str(found.value).startswith("data.images: ")
    assert "\n" not in str(found.value)


def check_rejected(source: str, path: Path, key: str, reason: str) -> None:
    """Of two images the one named `key` is rejected when it is opened, and the other one read."""
    opened = source_of(source, path)
    entries = {entry.key: entry for entry in opened.entries}
    with pytest.raises(Rejected, match=reason):
        opened.open(entries.pop(key))
    ((_, other),) = entries.items()
    assert opened.open(other) == JPEG


def test_a_zip_bomb_is_rejected_before_it_is_inflated(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", {"a.jpg": JPEG, "bomb.jpg": bytes(2**28 + 1)}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**20
    check_rejected("ffhq", path, "bomb.jpg", "unpacks to 268,435,457 bytes")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_member_of_a_zip_is_rejected_by_name(tmp_path: Path, method: int) -> None:
    path = write_zip(tmp_path / "x.zip", {"a.jpg": JPEG, "b.jpg": PNG}, method)
    data = path.read_bytes()
    path.write_bytes(flipped(data, data.index(b"b.jpg") + 2000))
    check_rejected("ffhq", path, "b.jpg", "damaged in its zip")


def test_a_file_too_large_for_an_image_is_not_read(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a.jpg": JPEG, "b.jpg": b""})
    with open(tmp_path / "b.jpg", "wb") as file:
        file.truncate(2**28 + 1)
    check_rejected("celebahq", tmp_path, "b.jpg", "too many for an image")


def test_an_image_that_changes_or_goes_while_others_are_read_is_rejected_by_name(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a.jpg": JPEG, "b.jpg": JPEG, "c.jpg": JPEG})
    opened = source_of("ffhq", tmp_path)
    (tmp_path / "b.jpg").write_bytes(JPEG + b"more")
    (tmp_path / "c.jpg").unlink()
    first, second, third = opened.entries
    assert opened.open(first) == JPEG
    with pytest.raises(Rejected, match="changed while images were read"):
        opened.open(second)
    with pytest.raises(Rejected, match=r"cannot be opened \(No such file"):
        opened.open(third)


def test_a_row_without_an_image_is_rejected_by_name(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [None, JPEG], [0, 0], None)
    check_rejected("parquet", path, "x.parquet/000000", "no bytes in its row")
