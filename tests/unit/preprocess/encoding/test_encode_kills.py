"""Whatever kills encoding, and however many share it, the shards and the index are the same bytes."""

import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import folder_lock
from common.loading import dump_recipe
from common.recipe import VAE, Data, Launch, Model, Recipe
from common.stage_jobs import run_in_jobs
from preprocess.encoding.decoding import _end_with
from preprocess.encoding.encoding import resolve
from preprocess.encoding.stage import STAGE
from preprocess.shards import INDEX, SAMPLES, LatentShards, shard_name, verify
from tests.encoding_stage import encode, encode_part, merge
from tests.photographs import photographs, write_folder

COUNT, SHARD, SIDE = 40, 4, 16
SHARDS = COUNT // SHARD


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_vae: Path) -> Recipe:
    folder = tmp_path_factory.mktemp("kills")
    images = {f"{number % 2}/{number}.png": data for number, data in enumerate(photographs(COUNT, "png", (24, 20)))}
    write_folder(folder / "images", images)
    recipe = Recipe(
        name="test",
        runs=str(folder / "runs"),
        data=Data(images=str(folder / "images"), shards=str(folder / "whole"), resolution=SIDE, shard_samples=SHARD),
        vae=VAE(path=str(tiny_vae), downsampling=4, batch_size=3),
        model=Model(num_classes=2),
    )
    encode(recipe)
    return recipe


def into(recipe: Recipe, folder: Path) -> Recipe:
    return replace(recipe, data=replace(recipe.data, shards=str(folder)))


def contents(recipe: Recipe) -> dict[str, bytes]:
    """Names that begin with a dot are locks, and what a killed writer left."""
    files = (path for path in Path(recipe.data.shards).iterdir() if not path.name.startswith("."))
    return {path.name: path.read_bytes() for path in files}


@contextmanager
def running(
    recipe: Recipe, parts: int, work: Callable[[Recipe, int, int], None] = encode_part
) -> Iterator[list[multiprocessing.process.BaseProcess]]:
    """Every part in a process of its own, forked from one that has imported what they need and has no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preprocess.encoding.encoding", "diffusers.models.autoencoders"])
    processes = [context.Process(target=work, args=(recipe, part, parts)) for part in range(parts)]
    for process in processes:
        process.start()
    try:
        yield processes
    finally:
        for process in processes:
            process.join(100)


@pytest.mark.parametrize(("parts", "kills"), [(1, 7), (2, 7), (4, 6)])
def test_kill_9_at_20_random_moments_changes_no_byte(recipe: Recipe, tmp_path: Path, parts: int, kills: int) -> None:
    for warm in ("first", "timed"):  # the first one waits for imports
        started = time.monotonic()
        with running(into(recipe, tmp_path / warm), parts):
            pass
    duration, moments, killed, folders = time.monotonic() - started, random.Random(parts), 0, 0
    while killed < kills:
        chosen = into(recipe, tmp_path / f"killed-{folders}")
        with running(chosen, parts) as processes:
            time.sleep(moments.uniform(0, 0.7 * duration))
            victim = moments.choice(processes)
            victim.kill()
        killed += victim.exitcode == -signal.SIGKILL
        tars = list(Path(chosen.data.shards).glob("*.tar")) if Path(chosen.data.shards).exists() else []
        folders += killed < kills and len(tars) > SHARDS - 2  # too little is left to be killed at: begin anew
    with running(chosen, parts):
        pass
    merge(chosen)
    assert contents(chosen) == contents(recipe)
    merge(chosen)
    assert contents(chosen) == contents(recipe)
    assert not list(verify(chosen.data.shards))


def test_a_decoding_process_whose_parent_was_killed_at_once_ends() -> None:
    """It would else stay for ever: it was born with another parent than the one that is gone."""
    context = multiprocessing.get_context("fork")
    for parent, status in ((os.getpid(), 0), (os.getpid() + 1, 1)):
        process = context.Process(target=_end_with, args=(parent,))
        process.start()
        process.join(30)
        assert process.exitcode == status


def test_a_death_costs_no_finished_shard(recipe: Recipe, tmp_path: Path) -> None:
    chosen = into(recipe, tmp_path)
    with running(chosen, 1) as (process,):
        while not (tmp_path / shard_name(3)).with_suffix(".json").exists():
            time.sleep(0.001)
        process.kill()
    assert not (tmp_path / INDEX).exists()
    before = [(tmp_path / shard_name(number)).stat().st_mtime_ns for number in range(4)]
    for name in (SAMPLES, INDEX):  # as merges leave them that are killed
        (tmp_path / f".{name}.node.1.tmp").write_bytes(b"half")
    encode(chosen)
    assert [(tmp_path / shard_name(number)).stat().st_mtime_ns for number in range(4)] == before
    assert contents(chosen) == contents(recipe)
    assert not list(tmp_path.glob(".*.tmp"))


def test_parts_that_are_missing_are_named(recipe: Recipe, tmp_path: Path) -> None:
    chosen = into(recipe, tmp_path)
    encode_part(chosen, 1, 3)
    assert {name for name in contents(chosen) if name.endswith(".tar")} == {shard_name(n) for n in (1, 4, 7)}
    with pytest.raises(UserError, match=r"lacks 7 of 10 shards: latents-000000\.tar, latents-000002\.tar, .*run "):
        merge(chosen)
    assert not (tmp_path / INDEX).exists()


def test_two_runs_in_one_folder_are_refused_but_parts_of_one_array_are_not(recipe: Recipe, tmp_path: Path) -> None:
    """Each held as another process holds it: a lock belongs to an opened file, not to a process."""
    chosen, whole = into(recipe, tmp_path), re.escape(str(tmp_path))
    with folder_lock(tmp_path), pytest.raises(UserError, match=f"{whole}: process .* is at work in it"):
        encode(chosen)
    with folder_lock(tmp_path), pytest.raises(UserError, match="is at work in it"):
        encode_part(chosen, 0, 2)
    with folder_lock(tmp_path, shared=True), folder_lock(tmp_path, ".lock-0-of-2"):
        for part, parts in ((0, 1), (0, 2), (0, 3)):  # a whole run, the same part, a part of another array
            with pytest.raises(UserError, match="is at work in it"):
                encode_part(chosen, part, parts)
        encode_part(chosen, 1, 2)
    encode(chosen)
    assert contents(chosen) == contents(recipe)


def encode_as_rank(recipe: Recipe, rank: int, ranks: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    encode(recipe)


def test_ranks_share_the_work_and_the_last_makes_the_index(recipe: Recipe, tmp_path: Path) -> None:
    chosen = into(recipe, tmp_path)
    with running(chosen, 3, encode_as_rank) as processes:
        pass
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert contents(chosen) == contents(recipe)


def test_a_job_array_on_this_machine_makes_the_same_bytes(recipe: Recipe, tmp_path: Path) -> None:
    chosen = into(replace(recipe, runs=str(tmp_path / "runs")), tmp_path / "shards")
    run_in_jobs(chosen, STAGE, "local", 2)
    assert contents(chosen) == contents(recipe)
    assert len(list((tmp_path / "runs/test/logs/encode").glob("*_log.out"))) == 2


FULL_DISK = """
import resource, sys
from common.loading import parse_recipe
from tests.encoding_stage import encode
from common.command import exit_status_of

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
sys.exit(exit_status_of(lambda: encode(parse_recipe(sys.argv[1]))))
"""


def test_a_full_disk_is_reported_and_the_run_resumes(recipe: Recipe, tmp_path: Path) -> None:
    chosen = into(recipe, tmp_path)
    encode_part(chosen, 0, 2)  # every other shard
    before = contents(chosen)
    limit = (Path(recipe.data.shards) / shard_name(0)).stat().st_size - 1
    arguments = [sys.executable, "-c", FULL_DISK, dump_recipe(chosen), str(limit)]
    process = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == 2, process.stderr
    assert f"error: {chosen.data.shards}/" in process.stderr
    assert "make room" in process.stderr
    assert contents(chosen) == before
    encode(chosen)
    assert contents(chosen) == contents(recipe)


@pytest.mark.parametrize("workers", [1, 3])
def test_decoding_workers_change_no_byte(recipe: Recipe, tmp_path: Path, workers: int) -> None:
    chosen = replace(into(recipe, tmp_path), launch=Launch(cpus_per_process=workers))
    encode(chosen)
    assert contents(chosen) == contents(recipe)
    assert resolve(chosen, download=False).is_finished
    assert len(LatentShards(chosen.data.shards)) == COUNT
