"""A bit flipped anywhere in a header: the image or the source is read, or refused in one printable line."""

import faulthandler
import json
import os
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from preprocess.images.images import Rejected, decode
from tests.photographs import (
    idx_bytes,
    photographs,
    source_of,
    tar_bytes,
    write_folder,
    write_lmdb,
    write_parquet,
    write_zip,
)
from tests.planted import JPEG, PNG, npy

FLIPS = 200


def flipped(data: bytes, bit: int) -> bytes:
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


@pytest.mark.parametrize("shape", [(24, 24, 3), (3, 20, 24), (24, 24)])
def test_each_flipped_bit_in_a_npy_header_gives_the_right_image_or_none(shape: tuple[int, ...]) -> None:
    data = npy(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    right, reasons = np.asarray(decode(data)), []
    for bit in range(1024):
        try:
            assert np.array_equal(np.asarray(decode(flipped(data, bit))), right)
        except Rejected as reason:
            reasons.append(str(reason))
    assert len(reasons) > 1000
    assert all(reason.isprintable() for reason in reasons)


def a_dataset_json(folder: Path) -> tuple[str, Path, range]:
    content = json.dumps({"labels": [["a.jpg", 0], ["b.jpg", 1]]}).encode()
    write_folder(folder / "x", {"a.jpg": JPEG, "b.jpg": PNG, "dataset.json": content})
    return "folder", folder / "x/dataset.json", range(len(content))


def a_json_of_a_webdataset(folder: Path) -> tuple[str, Path, range]:
    content = json.dumps({"label": 1, "meta": {"class": "cat"}}).encode()
    data = tar_bytes({"a.jpg": JPEG, "a.json": content})
    (folder / "x.tar").write_bytes(data)
    start = data.index(content)
    return "webdataset", folder / "x.tar", range(start, start + len(content))


def headers_of_a_tar(folder: Path) -> tuple[str, Path, range]:
    (folder / "x.tar").write_bytes(tar_bytes({f"{'long/' * 40}a.jpg": JPEG, "a.cls": b"0"}))
    return "webdataset", folder / "x.tar", range(512 * 4)


def the_directory_of_a_zip(folder: Path) -> tuple[str, Path, range]:
    path = write_zip(folder / "x.zip", {"a/a.jpg": JPEG, "b/b.jpg": PNG}, method=8)
    size = path.stat().st_size
    return "folder", path, range(path.read_bytes().index(b"PK\1\2"), size)


def the_footer_of_a_parquet_file(folder: Path) -> tuple[str, Path, range]:
    path = write_parquet(folder / "x.parquet", list(photographs(4)), [0, 1, 0, 1], ["a", "b"])
    size = path.stat().st_size
    return "parquet", path, range(size - 1500, size)


def the_headers_of_idx_files(folder: Path) -> tuple[str, Path, range]:
    arrays = {"images-idx3-ubyte": np.zeros((2, 2, 2), np.uint8), "labels-idx1-ubyte": np.zeros(2, np.uint8)}
    write_folder(folder, {name: idx_bytes(array) for name, array in arrays.items()})
    return "idx", folder / "images-idx3-ubyte", range(16)


def outcome(kind: str, path: Path) -> str:
    """ "read", or "refused" in a printable line that names the field; what is neither is raised."""
    told, ends = [], "read"
    try:
        source = source_of(kind, path)
        for entry in source.entries:
            try:
                source.open(entry)
            except Rejected as reason:
                told.append(f"data.images: {reason}")
    except UserError as error:
        told.append(str(error))
        ends = "refused"
    assert all(line.isprintable() and line.startswith("data.") for line in told)
    return ends


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    "make",
    [
        a_dataset_json,
        a_json_of_a_webdataset,
        headers_of_a_tar,
        the_directory_of_a_zip,
        the_footer_of_a_parquet_file,
        the_headers_of_idx_files,
    ],
)
def test_a_flipped_bit_in_a_sources_metadata_is_read_or_refused(
    make: Callable[[Path], tuple[str, Path, range]], tmp_path: Path
) -> None:
    kind, path, places = make(tmp_path)
    named = path.parent if path.name == "dataset.json" else path
    data, chosen, told = path.read_bytes(), random.Random(0), []
    assert outcome(kind, named) == "read"
    for _ in range(FLIPS):
        path.write_bytes(flipped(data, 8 * chosen.choice(places) + chosen.randrange(8)))
        told.append(outcome(kind, named))
    assert "refused" in told


def test_a_flip_in_an_lmdbs_own_pages_makes_no_traceback(tmp_path: Path) -> None:
    """LMDB trusts its pages: some flips end the process that reads it, here one of its own."""
    folder = write_lmdb(tmp_path / "x", dict(zip("abcd", photographs(4), strict=True)))
    path, chosen, ends = folder / "data.mdb", random.Random(0), []
    data = path.read_bytes()
    for _ in range(FLIPS // 3):
        path.write_bytes(flipped(data, chosen.randrange(len(data) // 4096) * 8 * 4096 + chosen.randrange(8 * 160)))
        if not (child := os.fork()):
            faulthandler.disable()
            try:
                os._exit(3 if outcome("lsun", folder) == "refused" else 0)
            finally:
                os._exit(1)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    assert 1 not in ends
    assert 3 in ends
    assert ends.count(0) + ends.count(3) > 0.9 * len(ends)
