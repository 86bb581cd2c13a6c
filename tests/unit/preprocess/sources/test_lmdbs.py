"""LMDBs of encoded images are read under any keys; one that holds something else is refused by what it looks like."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import UserError
from preprocess.sources import Source
from tests.photographs import photographs, source_of, write_folder, write_lmdb


@pytest.fixture(scope="module")
def webps() -> list[bytes]:
    return photographs(4, "webp", (16, 12))


def read(source: Source) -> dict[str, bytes]:
    return {entry.key: source.open(entry) for entry in source.entries}


@pytest.mark.parametrize("keys", [["0", "1", "10", "2"], ["00ab", "f1", "f2", "f3"], ["image-1", "image-2", "x", "é"]])
def test_images_are_read_under_any_keys(tmp_path: Path, webps: list[bytes], keys: list[str]) -> None:
    files = dict(zip(keys, webps, strict=True))
    path = write_lmdb(tmp_path / "church_outdoor_train_lmdb", files | {"length": b"4", "num-samples": b"4"})
    source = source_of("lsun", path)
    assert read(source) == files
    assert source.class_names == ["church_outdoor_train"]
    assert source.left_out == {"not an image: metadata of an LMDB": 2, "not an image: .mdb": 1}  # lock.mdb


def test_files_beside_an_lmdb_are_counted(tmp_path: Path, webps: list[bytes]) -> None:
    path = write_lmdb(tmp_path / "church_outdoor_val_lmdb", {"0": webps[0]})
    write_folder(path, {"README.md": b"", "preview/1.png": b"", ".cache/2": b""})
    source = source_of("lsun", path)
    assert len(source.entries) == 1
    beside = {"beside the LMDB, which is read": 1, "not an image: .md": 1, "not an image: .mdb": 1}
    assert source.left_out == beside | {"hidden folder, not looked into": 1}


@pytest.mark.parametrize("target", ["store/1234", "store/data.mdb"])
def test_an_lmdb_that_a_symbolic_link_leads_to_is_named_as_the_links_folder(
    tmp_path: Path, webps: list[bytes], target: str
) -> None:
    (tmp_path / "store").mkdir()
    (write_lmdb(tmp_path / "made", {"0": webps[0]}) / "data.mdb").rename(tmp_path / target)
    link = tmp_path / "church_outdoor_train_lmdb/data.mdb"
    link.parent.mkdir()
    link.symlink_to(tmp_path / target)
    source = source_of("lsun", link.parent)
    assert (read(source), source.class_names, source.left_out) == ({"0": webps[0]}, ["church_outdoor_train"], {})
    (tmp_path / "tower_val.lmdb").symlink_to(tmp_path / target)
    assert source_of("lsun", tmp_path / "tower_val.lmdb").class_names == ["tower_val"]


@pytest.mark.parametrize("kind", ["pipe", "link to nothing", "link to a folder", "link outside"])
def test_files_beside_an_lmdb_are_counted_and_not_opened(tmp_path: Path, webps: list[bytes], kind: str) -> None:
    path = write_lmdb(tmp_path / "x", {"0": webps[0]})
    (path / "lock.mdb").unlink()
    if kind == "pipe":
        os.mkfifo(path / "other")
    else:
        targets = {"link to nothing": "nowhere", "link to a folder": "..", "link outside": "/etc/passwd"}
        (path / "other").symlink_to(targets[kind])
    assert source_of("lsun", path).left_out == {"not an image: no suffix": 1}


def test_a_pipe_in_place_of_an_lmdb_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "data.mdb")
    with pytest.raises(UserError, match=r"data\.mdb is no regular file"):
        source_of("lsun", tmp_path)


@pytest.mark.parametrize("suffix", ["lmdb", "mdb"])
def test_an_lmdb_of_one_file_is_read(tmp_path: Path, webps: list[bytes], suffix: str) -> None:
    path = write_lmdb(tmp_path / "x", {"0": webps[0]}) / "data.mdb"
    path = path.rename(tmp_path / f"tower_train.{suffix}")
    source = source_of("lsun", path)
    assert (source.class_names, read(source), source.left_out) == (["tower_train"], {"0": webps[0]}, {})


def test_of_several_resolutions_in_one_lmdb_the_largest_is_read(tmp_path: Path, webps: list[bytes]) -> None:
    files = {f"{side}-0000{number}": webps[number] for side in (128, 256, 1024) for number in range(2)}
    source = source_of("lsun", write_lmdb(tmp_path / "x", files | {"length": b"2"}))
    assert list(read(source)) == ["1024-00000", "1024-00001"]
    assert source.left_out["of a smaller resolution"] == 4


def test_keys_of_which_some_look_like_resolutions_are_all_read(tmp_path: Path, webps: list[bytes]) -> None:
    keys = ["128-00000", "256-00000", "church"]
    source = source_of("lsun", write_lmdb(tmp_path / "x", dict(zip(keys, webps, strict=False))))
    assert list(read(source)) == keys


def test_a_damaged_first_image_does_not_refuse_the_others(tmp_path: Path, webps: list[bytes]) -> None:
    source = source_of("lsun", write_lmdb(tmp_path / "x", {"0": b"damaged", "1": webps[1]}))
    assert len(source.entries) == 2


def split_lmdbs(path: Path, images: list[bytes]) -> Path:
    for name in ("train.lmdb", "validation.lmdb"):
        write_lmdb(path / name, {"0": images[0]})
    return path


def scenes(path: Path, images: list[bytes]) -> Path:
    for name in ("bedroom_train_lmdb", "church_outdoor_train_lmdb"):
        write_lmdb(path / "scenes" / name, {"0": images[0]})
    return path


def named_databases(path: Path, images: list[bytes]) -> Path:
    import lmdb

    with lmdb.open(str(path / "x"), max_dbs=2, map_size=2**24) as environment:
        for name in (b"images", b"labels"):
            database = environment.open_db(name)
            with environment.begin(write=True) as transaction:
                transaction.put(b"0", images[0], db=database)
    return path / "x"


def values(*data: bytes) -> Callable[[Path, list[bytes]], Path]:
    return lambda path, _: write_lmdb(path / "x", {str(number): value for number, value in enumerate(data)})


REFUSED = {
    "splits": (split_lmdbs, r"LMDBs lie below it; name one of them: .*/train\.lmdb, .*/validation\.lmdb$"),
    "scenes": (scenes, r"name one of them: .*/scenes/bedroom_train_lmdb, .*/scenes/church_outdoor_train_lmdb$"),
    "named databases": (named_databases, "has a named database under its key 'images'; encoded images are read"),
    "raw pixels": (values(bytes(3 * 64 * 64)), r"raw pixels \(12,288 bytes = 64 x 64 x 3\) under its key '0'"),
    "raw grey pixels": (values(bytes(28 * 28)), r"raw pixels \(784 bytes = 28 x 28 x 1\)"),
    "pickles": (values(pickle.dumps([1, 2]), pickle.dumps("x" * 99)), r"a pickle \(.*\), which is never opened, under"),
    "text": (values(b"a cat"), r"5 bytes that begin b'a cat' under its key '0'"),
    "what it tells of itself": (lambda path, _: write_lmdb(path / "x", {"length": b"0"}), "an LMDB without images"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_lmdb_without_encoded_images_is_refused(tmp_path: Path, webps: list[bytes], case: str) -> None:
    make, told = REFUSED[case]
    with pytest.raises(UserError, match=told) as found:
        source_of("lsun", make(tmp_path, webps))
    assert "download" not in str(found.value)
