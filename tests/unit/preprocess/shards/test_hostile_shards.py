"""Whatever somebody writes into the files beside shards, sealed as ours are: one line, or the right samples.

Nothing outside the folders is opened, written or deleted, which Python's audit events tell.
"""

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from common.errors import UserError
from common.files import sha256_file
from common.sealed import write_sealed
from preprocess.shards import (
    INDEX,
    SAMPLES,
    Cache,
    LatentShards,
    Sample,
    finished_record,
    recorded_settings,
    remove_unfinished,
    rows_name,
    shard_name,
    storage,
    verify,
    write_index,
    write_shard,
)
from tests.seals import WRONG, edits
from tests.watching_files import only_below

SHAPE = (4, 2, 2)
SHARDS, EACH = 3, 4
COUNT = SHARDS * EACH
CLASSES = ["a", "b", "c"]
SETTINGS: Any = {"flips": True, "shard_samples": EACH, "vae": {"scaling_factor": 0.5, "shift_factor": 0.25}}


def sample(position: int) -> Sample:
    moments = np.abs(np.random.default_rng(position).normal(size=(2, *SHAPE))).astype(np.float16)
    return Sample(position, f"{position}.png", position % 3, 8, 8, moments[0], moments[1])


SAMPLES_OF_ALL = [sample(position) for position in range(COUNT)]
MOMENTS = np.stack([each.moments for each in SAMPLES_OF_ALL])
FLIPPED = np.stack([each.flipped for each in SAMPLES_OF_ALL])
LABELS = [each.label for each in SAMPLES_OF_ALL]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three shards, with nothing synced to disk: these tests write thousands of files."""
    monkeypatch.setattr("common.files.sync", lambda path: None)
    monkeypatch.setattr(storage, "PAUSE", 0.0)
    made = tmp_path / "shards"
    made.mkdir()
    records = []
    for number in range(SHARDS):
        part = SAMPLES_OF_ALL[EACH * number : EACH * (number + 1)]
        records.append(write_shard(made, number, part, SETTINGS, "0" * 16))
    write_index(made, records, SHAPE, CLASSES, {"not an image: .txt": 2}, ["a warning"], "0" * 16)
    return made


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """What somebody has beside the shards; a name of 16 characters, which is what stands of a hash in the cache."""
    (tmp_path / "home").mkdir()
    own = tmp_path / "home" / "my-thesis.tar"
    own.write_text("years of work")
    return own


def is_right(shards: LatentShards) -> None:
    """Every sample that there is said to be is the one it was."""
    everything = np.arange(len(shards))
    assert len(shards) == COUNT
    assert np.array_equal(shards.gather(everything), MOMENTS)
    if shards.index["settings"]["flips"]:
        assert np.array_equal(shards.gather(everything, everything >= 0), FLIPPED)
    assert shards.labels.tolist() == LABELS


def told_or_right(what: str, read: Callable[[], None]) -> bool:
    """Whether `read` was refused, in one printable line."""
    try:
        read()
    except UserError as error:
        line = str(error)
        assert line.isprintable(), what
        assert len(line) < 2000, what
        return True
    except AssertionError:
        raise
    except BaseException as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    return False


def wrong(victim: Path) -> list[Any]:
    """What takes a field's place: paths to the victim too."""
    return [*WRONG, f"{victim.parent}/my", f"../{victim.parent.name}/my", str(victim), "~", "/dev/null", "a\0b"]


def unsealed(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text())
    del value["content_key"]
    return value


def seal(path: Path, value: Any) -> None:
    with suppress(ValueError):  # no JSON could say it
        write_sealed(path, value)


def test_of_1500_edits_of_an_index_each_is_reported_or_harmless(folder: Path, victim: Path) -> None:
    index, refused = unsealed(folder / INDEX), 0
    for number, value in enumerate(edits(index, np.random.default_rng(0), 1500, wrong(victim))):
        seal(folder / INDEX, value)

        def read() -> None:
            shards = LatentShards(folder)
            is_right(shards)
            shards.prove_places()
            list(verify(folder))

        with only_below(folder):
            refused += told_or_right(f"edit {number}", read)
    assert victim.read_text() == "years of work"
    assert refused > 1000


def test_of_400_edits_of_a_remote_index_each_is_reported_or_harmless(
    folder: Path, victim: Path, tmp_path: Path
) -> None:
    """Behind a cache, which makes, links to and deletes files by names that the index has a part in."""
    index, refused = unsealed(folder / INDEX), 0
    far = fsspec.filesystem("memory")
    for path in folder.iterdir():
        far.pipe_file(f"/hostile/{path.name}", path.read_bytes())
    for number, value in enumerate(edits(index, np.random.default_rng(1), 400, wrong(victim))):
        seal(folder / INDEX, value)
        far.pipe_file(f"/hostile/{INDEX}", (folder / INDEX).read_bytes())
        cache = tmp_path / "cache" / str(number % 10)

        def read(cache: Path = cache) -> None:
            shards = LatentShards("memory://hostile", Cache(cache, 100_000))
            is_right(shards)
            for shard in shards.index["shardlist"]:
                shards.storage.discard(shard["url"], shard["sha256"])

        with only_below(tmp_path / "cache"):
            refused += told_or_right(f"edit {number}", read)
    assert victim.read_text() == "years of work"
    assert refused > 250


def test_of_600_edits_of_a_record_each_invalidates_it_or_writes_the_same_index(folder: Path, victim: Path) -> None:
    path = folder / "latents-000001.json"
    record, before = unsealed(path), (folder / INDEX).read_bytes()
    missing = same = 0
    for number, value in enumerate(edits(record, np.random.default_rng(2), 600, wrong(victim))):
        seal(path, value)

        def read() -> None:
            nonlocal missing, same
            list(recorded_settings(folder))
            found = [finished_record(folder, number, thorough=True) for number in range(SHARDS)]
            if None in found:
                missing += 1
                return
            write_index(folder, [each for each in found if each], SHAPE, CLASSES)
            is_right(LatentShards(folder))
            same += 1

        with only_below(folder):
            told_or_right(f"edit {number}", read)
        (folder / INDEX).write_bytes(before)
    assert missing > 300
    assert same > 0
    assert victim.read_text() == "years of work"


def test_of_600_edits_of_rows_each_is_reported_or_harmless(folder: Path) -> None:
    """The table's hash in the index is that of the edited one."""
    rows, index = np.load(folder / SAMPLES, allow_pickle=False), unsealed(folder / INDEX)
    extremes = np.array([0, 1, 2, 3, 128, 1536, 2**16, 2**31, 2**32 - 1, 2**48, 2**63, 2**64 - 1], np.uint64)
    refused = 0
    for number in range(600):
        random = np.random.default_rng(number)
        field, row = random.choice(rows.dtype.names), random.integers(COUNT)
        changed = rows.copy()
        value = extremes[random.integers(len(extremes))] if number % 2 else random.integers(2**20)
        changed[field][row] = np.array(value).astype(changed[field].dtype)
        np.save(folder / SAMPLES, changed)
        if number % 10 == 0:
            seal(folder / INDEX, index | {"samples_sha256": sha256_file(folder / SAMPLES)})

        def read() -> None:
            list(verify(folder))
            is_right(LatentShards(folder))

        with only_below(folder):
            refused += told_or_right(f"{field} of {row} = {value}", read)
    assert refused > 350


@pytest.mark.parametrize("name", [INDEX, "latents-000001.json"])
def test_each_flipped_bit_in_a_json_file_is_reported_or_the_file_written_again(folder: Path, name: str) -> None:
    """Bit 7 too, after which the bytes are no text."""
    data = (folder / name).read_bytes()
    for bit in [*range(7, 8 * len(data), 8 * 3), *range(0, 8 * len(data), 41)]:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        (folder / name).write_bytes(flipped)
        if name == INDEX:
            with pytest.raises(UserError, match=r"index\.json: (not readable as JSON|changed after)"):
                LatentShards(folder)
            with pytest.raises(UserError, match=r"index\.json: "):
                list(verify(folder))
        else:
            assert finished_record(folder, 1, thorough=False) is None
        list(recorded_settings(folder))  # what is damaged decides nothing


@pytest.mark.parametrize(
    "data", [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 100_000, b"\xff\xfe", b"", b"null", b"\0", b'"\\ud800"']
)
def test_an_unparsable_index_is_reported(folder: Path, data: bytes) -> None:
    (folder / INDEX).write_bytes(data)
    assert told_or_right(str(data[:20]), lambda: is_right(LatentShards(folder)))


def test_links_are_not_followed_where_we_write_lock_or_delete(folder: Path, victim: Path, tmp_path: Path) -> None:
    from common.files import folder_lock, remove_leftovers

    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "a").write_text("mine")
    for name in (".lock", f".{shard_name(1)}.node.1.tmp", f".{INDEX}.node.1.tmp", ".latents-x.tmp"):
        (folder / name).symlink_to(victim)
    (folder / ".folder.1.tmp").symlink_to(precious)
    with pytest.raises(UserError, match=r"\.lock: a symbolic link, but a regular file is needed"), folder_lock(folder):
        pass
    remove_unfinished(folder, range(SHARDS))
    write_index(folder, [each for number in range(SHARDS) if (each := finished_record(folder, number, thorough=True))],
                SHAPE, CLASSES)  # fmt: skip
    remove_leftovers(folder)
    assert [path.name for path in folder.glob(".*.tmp")] == [".latents-x.tmp"]  # which no writer of ours leaves
    assert victim.read_text() == "years of work"
    assert (precious / "a").read_text() == "mine"
    cache = tmp_path / "cache"
    (cache / ".locks").mkdir(parents=True)
    for number in (*range(storage.LOCKS), "room", "stage"):
        (cache / ".locks" / str(number)).symlink_to(victim)
    with pytest.raises(UserError, match=r"\.locks/\d+: a symbolic link"):
        LatentShards(f"file://{folder}", Cache(cache)).gather(np.arange(2))
    assert victim.read_text() == "years of work"


EPOCH = """
import sys
from pathlib import Path
import numpy as np
import common.files
from preprocess.shards import Cache, LatentShards
common.files.sync = lambda path: None
address, cache = sys.argv[1:]
shards = LatentShards(address, Cache(Path(cache)) if cache else None)
shards.prove_places()
order = np.random.default_rng(0).permutation(len(shards))
total = sum(int(shards.gather(order[start : start + 50], order[start : start + 50] % 2 == 0).view("u2").sum())
            for start in range(0, len(order), 50))
assert shards.labels.tolist() == [i % 3 for i in range(len(shards))]
print(total)
"""


def test_an_epoch_over_1100_shards_with_256_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a folder, and through a cache: a mapped file is not an open one."""
    monkeypatch.setattr("common.files.sync", lambda path: None)
    count, made = 1100, tmp_path / "shards"
    made.mkdir()
    records = [write_shard(made, number, [sample(number)], SETTINGS) for number in range(count)]
    write_index(made, records, SHAPE, CLASSES)
    expected = 0
    for number in range(count):
        each = sample(number)
        array = each.flipped if number % 2 == 0 else each.moments
        assert array is not None
        expected += int(array.view("u2").sum(dtype=np.uint64))
    for address, cache in ((str(made), ""), (f"file://{made}", str(tmp_path / "cache"))):
        run = subprocess.run(
            [sys.executable, "-c", EPOCH, address, cache], capture_output=True, text=True, timeout=200,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)),
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        assert int(run.stdout) == expected


def test_rows_that_lie_about_themselves_in_a_cache_are_fetched_again(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    is_right(LatentShards(f"file://{folder}", Cache(cache)))
    (table,) = cache.glob(f"*-{rows_name(shard_name(1))}")
    data = bytearray(table.read_bytes())
    data[-20] ^= 1
    table.write_bytes(data)
    is_right(LatentShards(f"file://{folder}", Cache(cache)))
