"""Shards are reproducible and readable by others; what is damaged is named before it is used."""

import hashlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from benchmarks.loader import IMAGENET, OPENING, synthetic_folder
from common.errors import UserError
from common.sealed import write_sealed
from preprocess.shards import (
    INDEX,
    SAMPLES,
    LatentShards,
    Rejection,
    Sample,
    finished_record,
    recorded_settings,
    rows_name,
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


def test_accepted_and_rejected_add_up(pristine: Path) -> None:
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


def test_a_reader_after_widss_manner_finds_every_sample(pristine: Path) -> None:
    """wids opens an index of kind `wids-shard-index-v1`, and finds a shard's samples by their members' names."""
    index = json.loads((pristine / INDEX).read_text())
    assert (index["__kind__"], index["wids_version"]) == ("wids-shard-index-v1", 1)
    read = []
    for shard in index["shardlist"]:
        data = (pristine / shard["url"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["filesize"], shard["sha256"])
        samples: dict[str, dict[str, bytes]] = {}
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                samples.setdefault(key, {})[extension] = file.read()
        assert len(samples) == shard["nsamples"]
        read += samples.values()
    assert np.array_equal([np.load(io.BytesIO(each["moments.npy"]), allow_pickle=False) for each in read], EXPECTED)
    assert [int(each["cls"]) for each in read] == [accepted.label for accepted in ACCEPTED]


def test_the_checksum_is_zlibs_crc_32(pristine: Path) -> None:
    rows = np.load(pristine / SAMPLES, allow_pickle=False)
    assert rows["crc32"].tolist() == [zlib.crc32(each.moments.tobytes(), each.label) for each in ACCEPTED]
    assert rows["flip_crc32"].tolist() == [zlib.crc32(each.flipped.tobytes(), each.label) for each in ACCEPTED]


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


# The damage drill: a shard of 24 samples in 200 blocks, cut at 199 places and with 400 bits flipped, one at a time.


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drill")
    write_index(folder, [write_shard(folder, 0, [sample(i) for i in range(DRILLED)], SETTINGS)], SHAPE, CLASSES)
    return folder


DRILLED = 24


def read_all(folder: Path) -> tuple[np.ndarray, np.ndarray, list[int]]:
    shards, everything = LatentShards(folder), np.arange(DRILLED)
    return shards.gather(everything), shards.gather(everything, everything >= 0), shards.labels.tolist()


def expected_samples() -> tuple[np.ndarray, np.ndarray, list[int]]:
    samples = [sample(position) for position in range(DRILLED)]
    moments, flipped = np.stack([each.moments for each in samples]), np.stack([each.flipped for each in samples])
    return moments, flipped, [each.label for each in samples]


def test_each_of_199_truncations_is_named_before_a_sample_is_used(drill: Path) -> None:
    tar = drill / shard_name(0)
    data = tar.read_bytes()
    places = np.linspace(0, len(data) // 512 - 1, 199).astype(int) * 512
    assert len(set(places.tolist())) == 199 <= len(data) // 512
    try:
        for place in places.tolist():
            tar.write_bytes(data[:place])
            with pytest.raises(
                UserError, match=rf"latents-000000\.tar: {place} bytes, the index says {len(data)} bytes"
            ):
                LatentShards(drill)
            (fault,) = verify(drill)
            assert "latents-000000.tar" in fault
    finally:
        tar.write_bytes(data)


def test_of_400_flipped_bits_each_that_changes_a_sample_is_named_and_each_at_all_is_found(drill: Path) -> None:
    """Flips over the whole tar, headers and padding included. Which samples one changes is known from the offsets."""
    tar = drill / shard_name(0)
    data = tar.read_bytes()
    rows = np.load(drill / SAMPLES, allow_pickle=False)
    expected = expected_samples()
    size = expected[0][0].nbytes
    changing = 0
    try:
        for bit in np.random.default_rng(0).choice(8 * len(data), 400, replace=False).tolist():
            flip_bit(tar, bit)
            starts = [(i, int(rows[name][i])) for i in range(DRILLED) for name in ("offset", "flip_offset")]
            damaged = [i for i, start in starts if start <= bit // 8 < start + size]
            (fault,) = verify(drill)
            if damaged:
                changing += 1
                with pytest.raises(UserError, match=rf"latents-000000\.tar: sample {damaged[0]} \(member"):
                    read_all(drill)
                assert f"sample {damaged[0]} " in fault
            else:
                assert all(np.array_equal(found, right) for found, right in zip(read_all(drill), expected, strict=True))
                assert "latents-000000.tar" in fault
            tar.write_bytes(data)
    finally:
        tar.write_bytes(data)
    assert changing > 40


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


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("accepted", 10**15, "accepted: Input should be less than"),
        ("accepted", 21, "contradict each other"),
        ("shape", [10**9, 10**9, 10**9], r"shape\.0: "),
        ("shape", [8, 400, 400], "contradict each other"),
        ("shape", None, "shape: "),
        ("shardlist", [], "contradict each other"),
        ("url", "../../etc/passwd", r"shardlist\.0\.url: "),
        ("url", "s3://elsewhere/x.tar", r"shardlist\.0\.url: "),
        ("url", ".hidden", r"shardlist\.0\.url: "),
        ("url", "a.tar\n", r"shardlist\.0\.url: "),
        ("sha256", "/home/u/my", r"shardlist\.0\.sha256: "),
        ("nsamples", 2.0, r"shardlist\.0\.nsamples: "),
    ],
)
def test_an_index_of_somebody_elses_is_refused_by_the_field_that_is_no_indexs(
    folder: Path, key: str, value: object, reason: str
) -> None:
    """Sealed as ours are: anyone can."""
    index = json.loads((folder / INDEX).read_text())
    del index["content_key"]
    place = index if key in index else index["shardlist"][0]
    place[key] = value
    write_sealed(folder / INDEX, index)
    for reader in (LatentShards, lambda path: list(verify(path))):
        with pytest.raises(UserError, match=rf"index\.json: .*{reason}.*download it again"):
            reader(folder)


def test_shards_of_another_version_are_never_written_over(folder: Path) -> None:
    for name in (INDEX, "latents-000001.json"):
        value = json.loads((folder / name).read_text())
        del value["content_key"]
        write_sealed(folder / name, {**value, "version": 2})
        with pytest.raises(UserError, match=rf"{name}: version 2, only 3 is read; encode again to another"):
            list(recorded_settings(folder))
        (folder / name).unlink()


def test_exchanged_and_copied_shards_are_named_before_the_first_step(tmp_path: Path) -> None:
    """All are of one size, and whole in themselves; the record, copied with its shard, says which one it was."""
    parts = [[sample(position) for position in range(start, start + 5)] for start in (0, 5)]
    records = [write_shard(tmp_path, number, part, SETTINGS) for number, part in enumerate(parts)]
    write_index(tmp_path, records, SHAPE, CLASSES)
    LatentShards(tmp_path).prove_places()
    tars = [tmp_path / shard_name(number) for number in range(2)]
    held = [tar.read_bytes() for tar in tars]
    for contents, wrong in ((held[::-1], 0), ([held[0]] * 2, 1), ([held[1]] * 2, 0)):
        for tar, data in zip(tars, contents, strict=True):
            tar.write_bytes(data)
        with pytest.raises(UserError, match=rf"latents-00000{wrong}\.tar: sample {5 * wrong} .*checksum"):
            LatentShards(tmp_path).prove_places()
        if contents[0] == contents[1]:  # the other one is where it belongs
            LatentShards(tmp_path).prove_places(part=1 - wrong, parts=2)
    for suffix in (".tar", ".samples.npy", ".json"):
        shutil.copy(tmp_path / f"latents-000000{suffix}", tmp_path / f"latents-000001{suffix}")
    assert finished_record(tmp_path, 1, thorough=True) is None


def test_a_label_that_is_no_class_is_named(folder: Path) -> None:
    rows = np.load(folder / SAMPLES, allow_pickle=False)
    rows["label"][3] = 3
    np.save(folder / SAMPLES, rows)
    shards = LatentShards(folder)
    assert shards.labels_at(np.array([2, 4])).tolist() == [2, 1]
    with pytest.raises(UserError, match=r"samples\.npy: class 3, but there are 3 classes"):
        shards.labels_at(np.array([3]))


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


def test_a_shard_with_only_rejected_images_is_empty_and_valid(tmp_path: Path) -> None:
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
    write_index(tmp_path, [record | {"channel_sums": [[0.0] * 4] * 2}], SHAPE, ["a"])
    assert "not finite" in next(verify(tmp_path))


def test_a_moments_member_is_a_plain_npy_file(pristine: Path) -> None:
    import tarfile

    with tarfile.open(pristine / shard_name(0)) as tar:
        member = tar.extractfile("0000000001.moments.npy")
        assert member is not None
        assert np.array_equal(np.load(io.BytesIO(member.read()), allow_pickle=False), EXPECTED[1])


def test_verify_lists_every_fault_there_is(folder: Path) -> None:
    """One damaged shard does not hide the next, nor does a missing one; in several processes too."""
    (folder / shard_name(0)).unlink()
    for position in (12, 17):
        flip_bit(
            folder / shard_name(1), 8 * (folder / shard_name(1)).read_bytes().index(sample(position).moments.tobytes())
        )
    flip_bit(folder / rows_name(shard_name(2)), 2000)
    faults = list(verify(folder))
    assert [re.search(r"latents-00000\d\S*:|sample \d+", fault)[0] for fault in faults] == [
        "latents-000000.tar:",
        "latents-000001.tar:",
        "latents-000001.tar:",
        "latents-000002.samples.npy:",
    ]
    assert ["sample 11" in faults[1], "sample 16" in faults[2]] == [True, True]
    assert list(verify(folder, processes=2)) == faults


def test_verify_tells_that_one_of_its_processes_was_killed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preprocess.shards.verification._sample_faults", lambda _: os.kill(os.getpid(), 9))
    with pytest.raises(UserError, match=r"one of 2 verifying processes was killed.*smaller --processes"):
        list(verify(folder, processes=2))


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [("label", 7, "class 7"), ("shard", 1, "has shard 1"), ("offset", 0, "checksum"), ("offset", 10**12, "checksum")],
)
def test_verify_finds_rows_that_cannot_be(folder: Path, column: str, value: int, reason: str) -> None:
    rows = np.load(folder / SAMPLES, allow_pickle=False)
    rows[column][3] = value
    np.save(folder / SAMPLES, rows)
    faults = list(verify(folder))
    assert any("sample 3 " in fault and reason in fault for fault in faults)
    assert any(SAMPLES in fault and "changed after it was written" in fault for fault in faults)


def test_verify_finds_another_shape_and_counts_that_do_not_add_up(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    del index["content_key"]
    write_sealed(folder / INDEX, {**index, "shape": [SHAPE[0], SHAPE[1] * 2, SHAPE[2] // 2], "found": COUNT + 1})
    faults = list(verify(folder))
    assert "do not add up" in faults[0]
    assert len(faults) == 1 + 2 * (COUNT - 1)
    assert "is no .npy file of shape (8, 8, 2)" in faults[1]


def test_the_command_lists_the_faults_and_ends_with_status_2(folder: Path) -> None:
    command = [sys.executable, "preprocess/verify_shards.py", str(folder), "--processes", "1"]
    whole = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (whole.returncode, whole.stdout) == (0, f"{folder}: 22 samples in 3 shards, no faults\n")
    (folder / shard_name(1)).unlink()
    damaged = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert damaged.returncode == 2
    assert damaged.stdout.count("\n") == 1
    assert shard_name(1) in damaged.stdout
    assert ": 1 faults" in damaged.stderr


def test_as_many_latents_as_imagenets_open_in_little_memory(tmp_path: Path) -> None:
    synthetic_folder(tmp_path, IMAGENET, 8192)
    command = [sys.executable, "-c", OPENING, str(tmp_path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    assert float(output.split()[-1]) < 300
