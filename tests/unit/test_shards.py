"""Shards are reproducible and readable by others; what is damaged is named before it is used."""

import hashlib
import io
import pickle
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from preprocess.shards import (
    INDEX,
    SAMPLES,
    LatentShards,
    Rejection,
    Sample,
    finished_record,
    shard_name,
    verify,
    write_index,
    write_shard,
)

SHAPE = (8, 4, 4)
COUNT, SHARD = 23, 10
REJECTED = 5  # this position could not be read
SETTINGS = {"flips": True, "crop": "center"}
CLASSES = ["a", "b", "c"]


def sample(position: int) -> Sample:
    moments = np.random.default_rng(position).normal(size=(2, *SHAPE)).astype(np.float16)
    moments[:, SHAPE[0] // 2 :] = np.abs(moments[:, SHAPE[0] // 2 :])
    return Sample(position, f"class/{position}.png", position % 3, 64, 48, moments[0], moments[1])


def outcomes(positions: range) -> Iterator[Sample | Rejection]:
    for position in positions:
        yield Rejection("class/5.png", "truncated") if position == REJECTED else sample(position)


def write(folder: Path) -> Path:
    folder.mkdir()
    ranges = [range(start, min(start + SHARD, COUNT)) for start in range(0, COUNT, SHARD)]
    records = [write_shard(folder, number, outcomes(part), SETTINGS) for number, part in enumerate(ranges)]
    write_index(folder, records, SHAPE, CLASSES)
    return folder


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("shards") / "pristine")


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "copy"))


ACCEPTED = [sample(position) for position in range(COUNT) if position != REJECTED]
EXPECTED = np.stack([accepted.moments for accepted in ACCEPTED])


def flip_bit(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(data))


def test_samples_come_back_in_any_order_with_their_labels_and_flips(pristine: Path) -> None:
    shards = LatentShards(pristine)
    assert (len(shards), shards.num_classes, shards.class_names) == (COUNT - 1, 3, CLASSES)
    assert shards.labels.dtype == np.int64
    assert shards.labels.tolist() == [accepted.label for accepted in ACCEPTED]
    indices = np.array([21, 0, 7, 7, 12])
    assert np.array_equal(shards.gather(indices), EXPECTED[indices])
    flip = np.array([True, False, True, False, True])
    expected = [
        ACCEPTED[index].flipped if flipped else ACCEPTED[index].moments
        for index, flipped in zip(indices, flip, strict=True)
    ]
    assert np.array_equal(shards.gather(indices, flip), np.stack(expected))
    assert shards.gather(np.array([], int)).shape == (0, *SHAPE)


def test_a_pickled_reader_opens_the_folder_anew(pristine: Path) -> None:
    shards = LatentShards(pristine)
    shards.gather(np.arange(3))
    assert np.array_equal(pickle.loads(pickle.dumps(shards)).gather(np.arange(22)), EXPECTED)  # noqa: S301


def test_accepted_and_rejected_are_what_was_found(pristine: Path) -> None:
    index = LatentShards(pristine).index
    assert (index["found"], index["accepted"]) == (COUNT, COUNT - 1)
    assert index["rejected"] == [{"key": "class/5.png", "reason": "truncated"}]


def test_the_indexs_statistics_are_those_of_posterior_draws(pristine: Path) -> None:
    mean, std = np.split(EXPECTED.astype(np.float64), 2, axis=1)
    statistics = LatentShards(pristine).index["latents"]
    variance = mean.var(axis=(0, 2, 3)) + (std**2).mean(axis=(0, 2, 3))
    assert np.allclose(statistics["mean"], mean.mean(axis=(0, 2, 3)))
    assert np.allclose(statistics["std"], np.sqrt(variance))


def test_equal_samples_make_equal_bytes(pristine: Path, tmp_path: Path) -> None:
    again = write(tmp_path / "again")
    for path in sorted(pristine.iterdir()):
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_tar_and_webdataset_read_the_shards(pristine: Path) -> None:
    import webdataset

    names = subprocess.run(["tar", "tf", pristine / shard_name(0)], check=True, capture_output=True, text=True).stdout
    assert names.split()[:2] == ["0000000000.moments.npy", "0000000000.moments_flip.npy"]
    urls = [str(pristine / shard["url"]) for shard in LatentShards(pristine).index["shardlist"]]
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [row["__key__"] for row in read] == [f"{accepted.position:010d}" for accepted in ACCEPTED]
    assert np.array_equal(np.stack([row["moments.npy"] for row in read]), EXPECTED)
    assert [row["cls"] for row in read] == [accepted.label for accepted in ACCEPTED]
    assert read[0]["json"] == {"key": "class/0.png", "width": 64, "height": 48}


def test_the_index_has_what_wids_readers_ask_for(pristine: Path) -> None:
    index = LatentShards(pristine).index
    assert index["wids_version"] == 1
    for shard in index["shardlist"]:
        data = (pristine / shard["url"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["filesize"], shard["sha256"])
    assert sum(shard["nsamples"] for shard in index["shardlist"]) == COUNT - 1


def test_a_flipped_bit_is_named_before_the_sample_is_used(folder: Path) -> None:
    tar = folder / shard_name(1)
    position = tar.read_bytes().index(ACCEPTED[12].moments.tobytes())
    flip_bit(tar, 8 * position + 1003)
    shards = LatentShards(folder)
    assert np.array_equal(shards.gather(np.arange(12)), EXPECTED[:12])
    with pytest.raises(UserError, match=r"latents-000001\.tar: sample 12 \(member 0000000013\).*checksum.*delete"):
        shards.gather(np.arange(22))
    (fault,) = verify(folder)
    assert "sample 12" in fault


def test_no_flipped_bit_in_a_shard_changes_a_sample_unseen(folder: Path) -> None:
    """Of 400 flips over the whole tar, headers included, `verify` reports each, and no reader gets a wrong number."""
    tar = folder / shard_name(0)
    data = tar.read_bytes()
    everything, flips = np.arange(9), np.ones(9, bool)
    flipped = np.stack([accepted.flipped for accepted in ACCEPTED[:9]])
    caught = 0
    for bit in np.random.default_rng(0).choice(8 * len(data), 400, replace=False).tolist():
        flip_bit(tar, bit)
        shards = LatentShards(folder)
        try:
            assert np.array_equal(shards.gather(everything), EXPECTED[:9])
            assert np.array_equal(shards.gather(everything, flips), flipped)
        except UserError:
            caught += 1
        assert len(list(verify(folder))) == 1
        tar.write_bytes(data)
    assert caught > 20


def test_no_flipped_bit_in_the_samples_table_changes_a_sample_unseen(folder: Path) -> None:
    table = folder / SAMPLES
    data = table.read_bytes()
    everything = np.arange(22)
    for bit in range(0, 8 * len(data), 19):
        flip_bit(table, bit)
        with suppress(UserError):
            shards = LatentShards(folder)
            assert np.array_equal(shards.gather(everything), EXPECTED)
            assert shards.labels.tolist() == [accepted.label for accepted in ACCEPTED]
        table.write_bytes(data)


def test_a_changed_index_is_refused(folder: Path) -> None:
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace('"accepted": 22', '"accepted": 23'))
    with pytest.raises(UserError, match=r"index\.json: changed after it was written"):
        LatentShards(folder)


@pytest.mark.parametrize("name", [shard_name(0), shard_name(2), SAMPLES])
@pytest.mark.parametrize("remaining", [0, 1, 700, -1])
def test_a_truncated_file_is_named_on_opening(folder: Path, name: str, remaining: int) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:remaining])
    with pytest.raises(UserError, match=name):
        LatentShards(folder)


@pytest.mark.parametrize("name", [shard_name(1), SAMPLES, INDEX])
def test_a_missing_file_is_named_on_opening(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(UserError, match=name):
        LatentShards(folder)


def test_flips_that_the_shards_do_not_hold_are_refused(tmp_path: Path) -> None:
    without = Sample(0, "0.png", 0, 64, 64, EXPECTED[0], None)
    write_index(tmp_path, [write_shard(tmp_path, 0, [without], {"flips": False})], SHAPE, ["a"])
    with pytest.raises(UserError, match=r"data\.flips"):
        LatentShards(tmp_path).gather(np.array([0]), np.array([True]))


def test_a_shard_whose_pictures_were_all_rejected_is_empty_and_whole(tmp_path: Path) -> None:
    records = [
        write_shard(tmp_path, 0, [Rejection("0.png", "truncated")], SETTINGS),
        write_shard(tmp_path, 1, [sample(1)], SETTINGS),
    ]
    write_index(tmp_path, records, SHAPE, ["a", "b"])
    assert np.array_equal(LatentShards(tmp_path).gather(np.array([0])), EXPECTED[1:2])
    assert not list(verify(tmp_path))


def test_a_shard_counts_as_finished_only_as_it_was_written(folder: Path) -> None:
    assert finished_record(folder, 0, thorough=True)
    assert finished_record(folder, 3, thorough=True) is None
    flip_bit(folder / shard_name(0), 70_000)
    assert finished_record(folder, 0, thorough=True) is None
    with open(folder / shard_name(1), "ab") as tar:
        tar.write(b"\0")
    assert finished_record(folder, 1, thorough=False) is None
    flip_bit((folder / shard_name(2)).with_suffix(".json"), 800)
    assert finished_record(folder, 2, thorough=False) is None


def test_verify_finds_numbers_that_no_encoder_writes(tmp_path: Path) -> None:
    bad = sample(0).moments.copy()
    bad[0, 0, 0] = np.nan
    record = write_shard(tmp_path, 0, [Sample(0, "0.png", 0, 1, 1, bad, bad)], SETTINGS)
    write_index(tmp_path, [record], SHAPE, ["a"])
    assert "not finite" in next(verify(tmp_path))


def test_a_moments_member_is_a_plain_npy_file(pristine: Path) -> None:
    import tarfile

    with tarfile.open(pristine / shard_name(0)) as tar:
        member = tar.extractfile("0000000001.moments.npy")
        assert member is not None
        assert np.array_equal(np.load(io.BytesIO(member.read()), allow_pickle=False), EXPECTED[1])
