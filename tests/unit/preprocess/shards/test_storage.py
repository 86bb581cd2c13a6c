"""Shards past one disk: what arrives in the cache is proved first, whole or absent, and kept within its limit."""

import errno
import http.server
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from common.errors import UserError
from common.loading import parse_recipe
from common.recipe import diffusion
from pipeline.training.data import Stream, stage_in
from preprocess.from_data import open_latents
from preprocess.shards import Cache, LatentShards, Sample, shard_name, storage, write_index, write_shard
from preprocess.shards.format import INDEX
from preprocess.shards.storage import CachedFolder

SHAPE, COUNT, SHARD = (4, 2, 2), 60, 10
ADDRESS = "memory://bucket/shards"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local")
    settings = {"flips": True, "shard_samples": SHARD, "vae": {"scaling_factor": 1.0, "shift_factor": 0.0}}
    samples = [made(position) for position in range(COUNT)]
    parts = [samples[start : start + SHARD] for start in range(0, COUNT, SHARD)]
    records = [write_shard(folder, number, part, settings) for number, part in enumerate(parts)]
    write_index(folder, records, SHAPE, ["a", "b", "c"])
    return folder


def made(position: int) -> Sample:
    moments = np.abs(np.random.default_rng(position).normal(size=(2, *SHAPE))).astype(np.float16)
    return Sample(position, f"{position}.png", position % 3, 8, 8, moments[0], moments[1])


@pytest.fixture
def remote(local: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    """The shards at ADDRESS."""
    monkeypatch.setattr(storage, "PAUSE", 0.0)
    filesystem = fsspec.filesystem("memory")
    for path in local.iterdir():
        filesystem.pipe_file(f"/bucket/shards/{path.name}", path.read_bytes())
    yield filesystem
    filesystem.rm("/bucket", recursive=True)


def cached(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.is_file())


def damage(remote: fsspec.AbstractFileSystem, name: str) -> None:
    data = bytearray(remote.cat_file(f"/bucket/shards/{name}"))
    data[300] ^= 4
    remote.pipe_file(f"/bucket/shards/{name}", bytes(data))


EVERYTHING = np.arange(COUNT)


def test_remote_shards_equal_local_ones(remote: object, local: Path, tmp_path: Path) -> None:
    here, there = LatentShards(local), LatentShards(ADDRESS, Cache(tmp_path))
    indices, flips = np.array([59, 0, 31, 31, 9, 10]), np.array([True, False, True, False, False, True])
    assert np.array_equal(there.gather(indices, flips), here.gather(indices, flips))
    assert there.labels.tolist() == here.labels.tolist()
    assert (there.shape, there.content_key, len(there)) == (here.shape, here.content_key, COUNT)


def test_only_the_shards_that_are_asked_for_are_fetched_and_each_once(
    remote: fsspec.AbstractFileSystem, tmp_path: Path
) -> None:
    LatentShards(ADDRESS, Cache(tmp_path)).gather(np.array([25, 3, 28]))
    assert [name.partition("-")[2] for name in cached(tmp_path)].count("latents-000002.tar") == 1
    assert len(cached(tmp_path)) == 4  # two tars and their rows
    for name in ("latents-000000.tar", "latents-000002.tar"):
        remote.rm(f"/bucket/shards/{name}")
    LatentShards(ADDRESS, Cache(tmp_path)).gather(np.array([25, 3, 28]))  # of a later process


@pytest.mark.parametrize("name", ["latents-000001.tar", "latents-000001.samples.npy"])
def test_files_that_contradict_the_index_never_reach_the_cache(
    remote: fsspec.AbstractFileSystem, tmp_path: Path, name: str
) -> None:
    damage(remote, name)
    shards = LatentShards(ADDRESS, Cache(tmp_path))
    shards.gather(np.arange(10))
    with pytest.raises(UserError, match=rf"{ADDRESS}/{name}: not the bytes that its index describes, 3 times"):
        shards.gather(np.arange(20))
    assert not any(name in path for path in cached(tmp_path))


def test_a_changed_index_far_away_is_refused(remote: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    text = remote.cat_file("/bucket/shards/index.json")
    remote.pipe_file("/bucket/shards/index.json", text.replace(b'"accepted": 60', b'"accepted": 61'))
    with pytest.raises(UserError, match=r"memory://bucket/shards/index\.json: changed after it was written"):
        LatentShards(ADDRESS, Cache(tmp_path))


@pytest.mark.parametrize("kind", ["flipped", "truncated"])
def test_a_copy_that_goes_bad_in_the_cache_is_fetched_again(
    remote: object, local: Path, tmp_path: Path, kind: str
) -> None:
    expected = LatentShards(local).gather(EVERYTHING)
    LatentShards(ADDRESS, Cache(tmp_path)).gather(EVERYTHING)
    for path in tmp_path.glob("*latents-00000[13].*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 1
        path.write_bytes(data if kind == "flipped" else data[: len(data) // 2])
    for path in tmp_path.glob("*latents-000003.tar"):
        data = bytearray(path.read_bytes())
        if kind == "flipped":
            data[data.index(made(33).moments.tobytes())] ^= 1
            path.write_bytes(data)
    assert np.array_equal(LatentShards(ADDRESS, Cache(tmp_path)).gather(EVERYTHING), expected)


def test_the_cache_stays_within_its_limit_by_deleting_the_least_recently_used(
    remote: object, local: Path, tmp_path: Path
) -> None:
    size = sum((local / name).stat().st_size for name in ("latents-000000.tar", "latents-000000.samples.npy"))
    limit = int(2.5 * size)
    expected = LatentShards(local).gather(EVERYTHING)
    shards = LatentShards(ADDRESS, Cache(tmp_path, limit))
    order = [0, 1, 0, 2, 0, 3, 4, 5, 0]
    for number in order:
        fresh = LatentShards(ADDRESS, Cache(tmp_path, limit))  # opens its files anew, which is using them
        indices = np.arange(SHARD * number, SHARD * (number + 1))
        for reader in (fresh, shards):
            assert np.array_equal(reader.gather(indices), expected[indices])
        del fresh, reader
        assert sum(path.stat().st_size for path in tmp_path.iterdir() if path.is_file()) <= limit
        if number in (2, 3):
            assert any("latents-000000.tar" in name for name in cached(tmp_path))
            assert not any("latents-000001.tar" in name for name in cached(tmp_path))
        # What is deleted and still mapped would take its room all the same.
        mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
        assert mapped
        assert not [line for line in mapped if "deleted" in line]
    with pytest.raises(UserError, match=r"data\.cache_gb: 0\.00 GB do not hold a shard"):
        LatentShards(ADDRESS, Cache(tmp_path / "small", 100)).gather(EVERYTHING)


FETCHING = """
import os, sys, time
import fsspec, numpy as np
from pathlib import Path
from preprocess.shards import Cache, LatentShards, storage

original = storage.CachedFolder._copy_hashed
def slowly(self, name, *how):
    os.write(1, f"{name}\\n".encode())
    time.sleep(float(sys.argv[3]))
    return original(self, name, *how)
storage.CachedFolder._copy_hashed = slowly
shards = LatentShards(sys.argv[1], Cache(Path(sys.argv[2])))
if sys.argv[4] == "stage":
    shards.storage.stage(shards.index["shardlist"])
shards.gather(np.arange(len(shards)))
"""


def fetching(local: Path, cache: Path, pause: float, how: str = "stage") -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", FETCHING, f"file://{local}", str(cache), str(pause), how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


@pytest.mark.parametrize("how", ["stage", "read"])
def test_two_processes_of_a_node_fetch_every_file_once(local: Path, tmp_path: Path, how: str) -> None:
    processes = [fetching(local, tmp_path, 0.3, how) for _ in range(2)]
    fetched = [name for process in processes for name in process.communicate(timeout=60)[0].split()]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(fetched) == sorted(path.name for path in local.glob("latents-*") if path.suffix != ".json")


def test_a_killed_fetch_leaves_no_half_copy_and_the_next_one_goes_on(local: Path, tmp_path: Path) -> None:
    process = fetching(local, tmp_path, 0.2)
    assert process.stdout is not None
    for _ in range(6):  # a few files are there, one at least is on its way
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=10)
    sizes = {path.name: path.stat().st_size for path in local.iterdir()}
    for name in cached(tmp_path):
        if not name.endswith(".tmp"):
            assert (tmp_path / name).stat().st_size == sizes[name.partition("-")[2]]
    again = fetching(local, tmp_path, 0.0)
    assert 0 < len(again.communicate(timeout=60)[0].split()) < 12
    assert again.returncode == 0


def test_leftovers_of_a_killed_fetch_are_deleted_when_room_is_needed(
    remote: object, local: Path, tmp_path: Path
) -> None:
    left = tmp_path / f".{16 * 'a'}-latents-000009.tar.node.1.tmp"
    left.write_bytes(bytes(10**6))
    os.utime(left, (0, time.time() - 2 * storage.ABANDONED))
    own = tmp_path / "thesis.tar"
    own.write_bytes(bytes(10**6))
    os.utime(own, (0, 0))
    LatentShards(ADDRESS, Cache(tmp_path, 10**6)).gather(np.arange(SHARD))
    assert not left.exists()
    assert own.exists()  # what is no copy of ours is nobody's to delete


def test_a_network_that_fails_twice_is_asked_a_third_time(
    remote: object, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, failures = CachedFolder._copy_hashed, [OSError("connection reset"), TimeoutError("timed out")]

    def failing(self: CachedFolder, *what: Any) -> str:
        if failures:
            raise failures.pop()
        return original(self, *what)

    monkeypatch.setattr(CachedFolder, "_copy_hashed", failing)
    expected = LatentShards(local).gather(EVERYTHING)
    assert np.array_equal(LatentShards(ADDRESS, Cache(tmp_path)).gather(EVERYTHING), expected)
    monkeypatch.setattr(CachedFolder, "_copy_hashed", lambda *_: failing_always())
    with pytest.raises(UserError, match=r"/latents-00000\d\S*: cannot be read \(connection reset\), 3 times"):
        LatentShards(ADDRESS, Cache(tmp_path / "other")).gather(EVERYTHING)


def failing_always() -> str:
    raise ConnectionResetError("connection reset")


def test_a_full_disk_is_named(remote: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(CachedFolder, "_copy_hashed", full)
    with pytest.raises(UserError, match=rf"data\.cache: no room in {tmp_path}; set data\.cache_gb"):
        LatentShards(ADDRESS, Cache(tmp_path)).gather(EVERYTHING)


def recipe_text(address: object) -> str:
    return f"name: a\ndata: {{shards: {address}, order: block, mixed_blocks: 2, lanes: 2}}\nmodel: {{num_classes: 3}}"


def test_training_reads_the_same_stream_from_a_folder_an_address_and_a_stage(
    remote: object, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    batches = []
    for address, overrides in (
        (local, ()),
        (ADDRESS, ("data.cache=$SCRATCH/a", "data.cache_gb=0.0001")),
        (local, ("data.cache=$SCRATCH/b", "data.stage_in=true")),
    ):
        recipe = parse_recipe(recipe_text(address), ("train.batch_size=8", *overrides))
        shards = open_latents(recipe.data)
        stage_in(recipe.data, shards)
        batches.append(Stream(recipe, shards, diffusion(recipe)).batch(torch.arange(20, 100)))
    for name, tensor in vars(batches[0]).items():
        assert all(torch.equal(vars(batch)[name], tensor) for batch in batches), name
    assert len(cached(tmp_path / "b")) == 2 * COUNT // SHARD


def test_a_set_that_is_too_large_to_stage_in_is_refused(remote: object, tmp_path: Path) -> None:
    shards = LatentShards(ADDRESS, Cache(tmp_path, 30_000))
    assert isinstance(shards.storage, CachedFolder)
    with pytest.raises(
        UserError, match=r"data\.stage_in: memory://bucket/shards holds 0\.00 GB, data\.cache_gb allows"
    ):
        shards.storage.stage(shards.index["shardlist"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.shards=s3://bucket/shards",), r"data\.shards: s3://bucket/shards needs data\.cache"),
        (("data.stage_in=true",), r"data\.stage_in needs data\.cache"),
        (("data.lanes=5",), r"data\.lanes: 5 do not divide train\.batch_size, 512"),
        (("data.cache=$UNSET_VARIABLE/x",), r"data\.cache: \$UNSET_VARIABLE/x names a variable that is not set"),
        (("data.cache=/proc/x",), r"data\.cache: /proc/x: not written"),
        (("data.cache=/tmp", "data.shards=nowhere://x"), r"data\.shards: nowhere://x cannot be opened: Protocol not"),
        (("data.cache=/tmp", "data.shards=memory://empty"), r"data\.shards: memory://empty has no index\.json"),
        (("data.format=ffcv",), r"data\.format: .*/ffcv has no index\.json; run preprocess/beton\.py"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(local: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_latents(parse_recipe(recipe_text(local), overrides).data).gather(EVERYTHING)


def test_a_remote_address_needs_a_cache() -> None:
    with pytest.raises(UserError, match=r"data\.cache: not set, but .* is remote; set it to a folder"):
        LatentShards("s3://bucket/shards")


def test_shards_of_another_version_of_the_data_set_are_not_taken_from_the_cache(
    remote: fsspec.AbstractFileSystem, local: Path, tmp_path: Path
) -> None:
    LatentShards(ADDRESS, Cache(tmp_path / "cache")).gather(EVERYTHING)
    other = Path(shutil.copytree(local, tmp_path / "other"))
    samples = [Sample(i, f"{i}.png", 0, 8, 8, made(i + 99).moments, made(i + 99).moments) for i in range(SHARD)]
    write_index(other, [write_shard(other, 0, samples, LatentShards(local).index["settings"])], SHAPE, ["a"])
    for path in other.iterdir():
        remote.pipe_file(f"/bucket/shards/{path.name}", path.read_bytes())
    found = LatentShards(ADDRESS, Cache(tmp_path / "cache")).gather(np.arange(SHARD))
    assert np.array_equal(found, np.stack([sample.moments for sample in samples]))
    assert sum(shard_name(0) in name for name in cached(tmp_path / "cache")) == 2


def test_a_far_side_that_sends_more_than_its_index_says_is_stopped(
    remote: fsspec.AbstractFileSystem, tmp_path: Path
) -> None:
    remote.pipe_file("/bucket/shards/latents-000001.tar", bytes(10**8))
    written: list[int] = []

    def watched(self: CachedFolder, *what: Any) -> str:
        found = original(self, *what)
        written.append(what[1].stat().st_size)
        return found

    original = CachedFolder._copy_hashed
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(CachedFolder, "_copy_hashed", watched)
        with pytest.raises(UserError, match=r"latents-000001\.tar: not the bytes that its index describes, 3 times"):
            LatentShards(ADDRESS, Cache(tmp_path)).gather(EVERYTHING)
    assert max(written) < 10**6


class Faulty(http.server.SimpleHTTPRequestHandler):
    """A server of shards whose file `broken` is answered by a status, cut short or not at all, so many times."""

    broken, how, times = INDEX, "404", 0

    def do_GET(self) -> None:
        if self.path.rpartition("/")[2] != self.broken or not self.times:
            super().do_GET()
            return
        type(self).times -= 1
        self.close_connection = True
        if self.how.isdigit():
            self.send_error(int(self.how))
        elif self.how == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"x" * 100)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address(local: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(storage, "PAUSE", 0.0)
    fsspec.filesystem("http").invalidate_cache()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Faulty, directory=str(local))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("broken", "how", "words"),
    [
        (INDEX, "404", f"has no {INDEX}"),
        (INDEX, "403", f"{INDEX}: cannot be read \\(403.*credentials"),
        (INDEX, "cut", f"{INDEX}: cannot be read"),
        (INDEX, "drop", f"{INDEX}: cannot be read"),
        (shard_name(1), "404", "missing; "),
        (shard_name(1), "503", r"cannot be read \(503.*\), 3 times"),
        (shard_name(1), "cut", r"cannot be read \(.*\), 3 times"),
        (shard_name(1), "drop", r"cannot be read \(.*\), 3 times"),
    ],
)
def test_faults_of_a_web_server_are_named_and_shards_asked_for_again(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, how: str, words: str
) -> None:
    monkeypatch.setattr(Faulty, "broken", broken)
    monkeypatch.setattr(Faulty, "how", how)
    monkeypatch.setattr(Faulty, "times", 100)
    with pytest.raises(UserError, match=words) as raised:
        LatentShards(address, Cache(tmp_path)).gather(EVERYTHING)
    assert "\n" not in str(raised.value)
    monkeypatch.setattr(Faulty, "times", 1 if how != "404" and broken != INDEX else 0)  # a fault that passes
    assert len(LatentShards(address, Cache(tmp_path)).gather(EVERYTHING)) == COUNT


READING = """
import os, sys
import fsspec.implementations.local  # before the other user, who may not read root's Python
import numpy as np
from pathlib import Path
from common.errors import UserError
from preprocess.shards import Cache, LatentShards
os.setgroups([])
os.setuid(65534)
try:
    print(LatentShards(sys.argv[1], Cache(Path(sys.argv[2]))).gather(np.arange(30)).shape[0])
except UserError as error:
    print(error)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_users_cache_is_read_if_complete_and_named_if_not(local: Path) -> None:
    with tempfile.TemporaryDirectory() as name:  # which others may enter, other than pytest's
        shared = Path(name)
        shared.chmod(0o755)
        Path(shutil.copytree(local, shared / "shards")).chmod(0o755)
        address, cache = f"file://{shared}/shards", shared / "cache"
        LatentShards(address, Cache(cache)).gather(EVERYTHING)
        command = [sys.executable, "-c", READING, address, str(cache)]
        refusal = rf"data\.cache: {cache}: not written \(Permission denied\); .* or choose another folder"
        for said in ("30", refusal):
            read = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert re.match(said, read.stdout), read.stdout + read.stderr
            for copy in cache.glob("*-latents-000001.tar"):
                copy.unlink()
