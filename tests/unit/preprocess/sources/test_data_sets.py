"""Every data set, in every form in which it is passed on, gives the same images under the right labels."""

import pickle
import random
import zipfile
from pathlib import Path

import pytest

from common.errors import UserError
from preprocess.sources import Source, fingerprint
from tests.photographs import photographs, source_of, tar_bytes, write_folder, write_lmdb, write_parquet, write_zip

WNIDS = ("n01440764", "n01443537", "n15075141")
NAMES = ["n01440764 tench, Tinca tinca", "n01443537 goldfish, Carassius auratus"]
IMAGENET = {f"{wnid}/{wnid}_{number}.JPEG": label for label, wnid in enumerate(WNIDS) for number in (2, 10, 7)}


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    return photographs(12)


def check(source: Source, expected: dict[str, tuple[int, bytes]]) -> None:
    """Every image is there under its key with its label, at random too."""
    entries = list(source.entries)
    assert [(entry.label, entry.key) for entry in entries] == sorted(
        (label, key) for key, (label, _) in expected.items()
    )
    random.Random(0).shuffle(entries)
    assert {entry.key: (entry.label, source.open(entry)) for entry in entries} == expected


def imagenet(images: list[bytes]) -> dict[str, tuple[int, bytes]]:
    return {key: (label, images[number]) for number, (key, label) in enumerate(sorted(IMAGENET.items()))}


def imagenet_tar(path: Path, expected: dict[str, tuple[int, bytes]]) -> Path:
    """ILSVRC2012_img_train.tar: a tar of tars, here in another order than that of the wnids."""
    inner = {}
    for wnid in reversed(WNIDS):
        files = {key.partition("/")[2]: data for key, (_, data) in expected.items() if key.startswith(wnid)}
        inner[f"{wnid}.tar"] = tar_bytes(dict(sorted(files.items(), reverse=True)))
    path.write_bytes(tar_bytes(inner))
    return path


def test_imagenets_folder_and_its_tar_of_tars_are_the_same_list(tmp_path: Path, images: list[bytes]) -> None:
    expected = imagenet(images)
    folder = write_folder(tmp_path / "train", {key: data for key, (_, data) in expected.items()})
    tar = imagenet_tar(tmp_path / "ILSVRC2012_img_train.tar", expected)
    sources = [source_of("imagenet", path) for path in (folder, tar)]
    for source in sources:
        check(source, expected)
        assert source.class_names[:2] == NAMES
    assert fingerprint(sources[0]) == fingerprint(sources[1])


def test_imagenets_parquet_has_the_standard_indices_and_names(tmp_path: Path, images: list[bytes]) -> None:
    labels = [0, 999, 134, 517, 1, 0]
    names = [f"name {label}" for label in range(1000)]
    for number in range(2):
        share = slice(3 * number, 3 * number + 3)
        write_parquet(tmp_path / f"data/train-0000{number}-of-00002.parquet", images[share], labels[share], names)
    source = source_of("imagenet", tmp_path / "data")
    keys = [f"train-0000{number // 3}-of-00002.parquet/00000{number % 3}" for number in range(6)]
    assert [(entry.key, entry.label) for entry in source.entries] == list(zip(keys, labels, strict=True))
    assert [source.open(source.entries[number]) for number in (5, 0, 3, 1)] == [images[n] for n in (5, 0, 3, 1)]
    assert len(source.class_names) == 1000
    assert source.class_names[:2] == NAMES
    assert len(set(source.class_names)) == 1000


def test_a_parquet_data_set_has_its_own_class_names(tmp_path: Path, images: list[bytes]) -> None:
    write_parquet(tmp_path / "train.parquet", images, [number % 2 for number in range(12)], ["cat", "dog"])
    source = source_of("parquet", tmp_path / "train.parquet")
    assert source.class_names == ["cat", "dog"]
    assert all(source.open(entry) == images[number] for number, entry in enumerate(source.entries))
    with pytest.raises(UserError, match=r"has 2 classes, ImageNet-1k has 1000; set data\.source=parquet"):
        source_of("imagenet", tmp_path / "train.parquet")


@pytest.mark.parametrize("kind", ["binary", "large_binary"])
def test_a_parquet_column_can_hold_plain_bytes(tmp_path: Path, images: list[bytes], kind: str) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"image": pyarrow.array(images, kind), "label": [0] * 12})
    parquet.write_table(table, tmp_path / "x.parquet")
    source = source_of("parquet", tmp_path / "x.parquet")
    assert [source.open(entry) for entry in source.entries] == images


FACES = {
    "ffhq": ["00000/00000.png", "00000/00001.png", "01000/01000.png"],  # the tree of thousands
    "ffhq-flat": ["00000.png", "00001.png", "69999.png"],
    "celebahq": ["0.jpg", "1.jpg", "10.jpg", "2.png"],
    "celebahq-npy": ["imgHQ00000.npy", "imgHQ00001.npy"],
}


@pytest.mark.parametrize("form", ["folder", "stored zip", "deflated zip"])
@pytest.mark.parametrize("layout", FACES)
def test_faces_are_one_class_in_a_tree_flat_or_in_a_zip(
    tmp_path: Path, images: list[bytes], layout: str, form: str
) -> None:
    files = dict(zip(FACES[layout], images, strict=False))
    extra = {"README.txt": b"a face a file", "__MACOSX/._00000.png": b"not an image"}
    if form == "folder":
        path = write_folder(tmp_path / "faces", {**files, "README.txt": b"a face a file"})
    else:
        method = zipfile.ZIP_STORED if form == "stored zip" else zipfile.ZIP_DEFLATED
        path = write_zip(tmp_path / "faces.zip", {**extra, **files}, method)
    source = source_of(layout.partition("-")[0], path)
    check(source, {key: (0, data) for key, data in files.items()})
    assert (source.class_names, source.left_out["not an image: .txt"]) == (["face"], 1)
    assert source.left_out["hidden folder, not looked into"] == (form != "folder")


@pytest.mark.parametrize("form", ["lmdb", "mdb", "folder", "zip"])
def test_lsun_is_one_class_named_as_its_category(tmp_path: Path, form: str) -> None:
    webps = photographs(5, "webp")
    files = {f"{'09af'[number % 4]}{number}c5d": data for number, data in enumerate(webps)}
    if form in ("lmdb", "mdb"):
        path = write_lmdb(tmp_path / "church_outdoor_train_lmdb", files)
        path = path / "data.mdb" if form == "mdb" else path
    else:
        files = {f"{name}.webp": data for name, data in files.items()}
        folder = tmp_path / "church_outdoor_train"
        path = write_folder(folder, files) if form == "folder" else write_zip(folder.with_suffix(".zip"), files)
    source = source_of("lsun", path)
    check(source, {key: (0, data) for key, data in files.items()})
    assert source.class_names == ["church_outdoor_train"]


def test_a_folder_of_classes_is_the_same_list_in_a_zip(tmp_path: Path, images: list[bytes]) -> None:
    expected = {
        f"{name}/sub/{number}.jpg": (label, images[number])
        for number, (label, name) in enumerate([(1, "dog"), (0, "cat"), (1, "dog")])
    }
    files = {key: data for key, (_, data) in expected.items()}
    sources = [
        source_of("folder", path)
        for path in (write_folder(tmp_path / "images", files), write_zip(tmp_path / "images.zip", files))
    ]
    for source in sources:
        check(source, expected)
        assert source.class_names == ["cat", "dog"]


@pytest.mark.parametrize("pattern", ["", "train-{000000..000001}.tar", "train-000000.tar"])
def test_a_webdataset_is_labelled_by_its_cls_members(tmp_path: Path, images: list[bytes], pattern: str) -> None:
    expected = {}
    for shard in range(2):
        files = {}
        for number in range(3):
            key, label, data = f"{shard}/{number}", (5 * shard + 2 * number) % 4, images[3 * shard + number]
            files |= {f"{key}.jpg": data, f"{key}.cls": str(label).encode(), f"{key}.json": b"{}"}
            if not pattern or "{" in pattern or shard == 0:
                expected[f"train-00000{shard}.tar/{key}.jpg"] = (label, data)
        (tmp_path / f"train-00000{shard}.tar").write_bytes(tar_bytes(files))
    source = source_of("webdataset", tmp_path / pattern)
    assert {entry.key: (entry.label, source.open(entry)) for entry in source.entries} == expected
    assert [entry.key for entry in source.entries] == list(expected)
    assert source.class_names == ["0", "1", "2", "3"] if len(expected) > 3 else source.class_names[0] == "0"


def test_a_million_entries_take_less_than_a_hundred_bytes_each() -> None:
    from preprocess.sources import Entries, Entry

    count = 200_000
    entries = Entries(
        Entry(f"n{number % 1000:08d}/image_{number}.JPEG", number % 1000, number) for number in range(count)
    )
    assert len(pickle.dumps(entries)) / count < 100
    assert entries[123_456] == Entry("n00000456/image_123456.JPEG", 456, 123_456)
