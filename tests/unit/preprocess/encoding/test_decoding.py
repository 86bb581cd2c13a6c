"""Decoding in processes: in order, without /dev/shm, and whatever ends one is told with the image it had in hand."""

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from common.recipe import VAE, Data, Launch, Model, Recipe
from preprocess.encoding import image_loader
from preprocess.encoding.decoding import AHEAD, decoded
from preprocess.encoding.image_loader import ImageLoader
from preprocess.shards import Rejection, shard_name
from preprocess.sources import Entry, open_source
from tests.encoding_stage import encode
from tests.photographs import photographs, write_folder

COUNT, SIDE, BATCH = 60, 16, 3
BAD = b"ends its decoder"
BATCHES = [range(start, min(start + BATCH, COUNT)) for start in range(0, COUNT, BATCH)]
real_decode = image_loader.decode


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {f"{number:02d}.png": data for number, data in enumerate(photographs(COUNT, "png", (24, 20)))}
    return write_folder(tmp_path / "images", files | {"31.png": b"not an image"})


@pytest.fixture
def loader(folder: Path) -> ImageLoader:
    return ImageLoader(open_source(Data(images=str(folder))), "center", SIDE)


@pytest.mark.parametrize("processes", [1, 3, 50])
def test_batches_are_complete_and_in_order_with_any_number_of_processes(loader: ImageLoader, processes: int) -> None:
    assert len(BATCHES) > AHEAD  # places are used again
    with decoded(loader, BATCHES, processes) as loaded:
        kept = list(loaded)
    assert [position for batch in kept for position in batch.positions] == [*range(31), *range(32, COUNT)]
    for batch, positions in zip(kept, BATCHES, strict=True):
        alone = loader[positions]
        assert (batch.positions, batch.sizes, batch.rejected) == (alone.positions, alone.sizes, alone.rejected)
        assert batch.images is not None
        assert alone.images is not None
        assert torch.equal(batch.images, alone.images)
    assert not multiprocessing.active_children()


def test_batches_of_which_nothing_can_be_read_have_no_images(tmp_path: Path) -> None:
    write_folder(tmp_path, {f"{number}.png": b"none" for number in range(5)})
    with decoded(
        ImageLoader(open_source(Data(images=str(tmp_path))), "center", SIDE), [range(2), range(2, 5)], 2
    ) as loaded:
        first, second = loaded
    assert first.images is second.images is None
    assert len(first.rejected + second.rejected) == 5


def test_leaving_early_ends_the_processes(loader: ImageLoader) -> None:
    with decoded(loader, BATCHES, 3) as loaded:
        next(loaded)
        assert len(multiprocessing.active_children()) == 3
    assert not multiprocessing.active_children()


def test_errors_of_a_source_or_a_crop_name_the_image(loader: ImageLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open, real_crop = loader.source.open, loader.crop

    def open_(entry: Entry) -> bytes:
        if entry.key == "01.png":
            raise KeyError("a fault of a library")
        if entry.key == "02.png":
            raise OSError(5, "Input/output error", "/tmp/xyz")
        return real_open(entry)

    def crop(image: Image.Image, resolution: int) -> Image.Image:
        if np.array_equal(np.asarray(image), np.asarray(real_decode(real_open(loader.source.entries[4])))):
            raise MemoryError
        return real_crop(image, resolution)

    monkeypatch.setattr(loader.source, "open", open_)
    monkeypatch.setattr(loader, "crop", crop)
    with decoded(loader, [range(6)], 1) as loaded:
        (batch,) = loaded
    assert batch.positions == [0, 3, 5]
    assert batch.rejected == [
        Rejection("01.png", "cannot be read (KeyError: 'a fault of a library')"),
        Rejection("02.png", "cannot be read (Input/output error)"),
        Rejection("04.png", "cannot be cropped (MemoryError)"),
    ]


def never_return() -> None:
    while True:
        pass


def end_by(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def leave(status: int) -> None:
    raise SystemExit(status)


ENDS: dict[str, tuple[Callable[[], None], str]] = {
    "killed": (
        end_by(signal.SIGKILL),
        "ended with SIGKILL, probably for lack of memory; allow more memory or set a smaller",
    ),
    "without memory": (end_by(signal.SIGBUS), "ended with SIGBUS, probably for lack of memory; allow more memory"),
    "crashed": (end_by(signal.SIGSEGV), "ended with SIGSEGV; repair or remove this image"),
    "aborted": (os.abort, "ended with SIGABRT; repair or remove this image"),
    "exited": (lambda: os._exit(3), "ended with status 3; look for the reason above"),
    "left": (lambda: leave(4), "ended with status 4; look for the reason above"),
    "without an end": (never_return, "took more than 0.3 seconds of CPU time; repair or remove this image"),
}


@pytest.mark.parametrize("case", ENDS)
def test_a_dead_decoding_process_is_reported_with_its_image_and_finished_shards_are_kept(
    case: str, folder: Path, tmp_path: Path, tiny_vae: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end, told = ENDS[case]
    (folder / "31.png").write_bytes(BAD)

    def decode(data: bytes) -> Image.Image:
        if data == BAD:
            faulthandler.disable()  # pytest's, which would print what is meant
            end()
        return real_decode(data)

    monkeypatch.setattr(image_loader, "decode", decode)
    monkeypatch.setattr("preprocess.encoding.decoding.MAX_SECONDS", 0.3)
    recipe = Recipe(
        name="test",
        data=Data(images=str(folder), shards=str(tmp_path / "shards"), resolution=SIDE, shard_samples=10),
        vae=VAE(path=str(tiny_vae), downsampling=4, batch_size=3),
        model=Model(num_classes=1),
        launch=Launch(cpus_per_process=2),
    )
    with pytest.raises(UserError, match=f"^31.png: .*{told}.* finished shards are kept$") as found:
        encode(recipe)
    assert "\n" not in str(found.value)
    assert {path.name for path in (tmp_path / "shards").glob("*.tar")} == {shard_name(0), shard_name(1), shard_name(2)}
    assert not multiprocessing.active_children()


def test_a_process_that_dies_between_two_images_is_reported(loader: ImageLoader) -> None:
    with decoded(loader, BATCHES, 2) as loaded:
        next(loaded)
        time.sleep(0.2)  # until it waits for a free place: if it does not yet, an image is named
        for process in multiprocessing.active_children():
            process.kill()
            process.join()
        with pytest.raises(UserError, match="decoding process ended with SIGKILL"):
            list(loaded)


def test_decoding_processes_ignore_signals_to_the_group(loader: ImageLoader) -> None:
    with decoded(loader, BATCHES, 2) as loaded:
        next(loaded), next(loaded)
        for process in multiprocessing.active_children():
            assert process.pid is not None
            for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
                os.kill(process.pid, number)
        assert len(list(loaded)) == len(BATCHES) - 2


def test_where_no_process_can_be_started_the_setting_is_named(
    loader: ImageLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("mmap.mmap", full)
    with (
        pytest.raises(UserError, match=r"launch\.cpus_per_process: no room for 2 .*Cannot allocate memory"),
        decoded(loader, BATCHES, 2),
    ):
        pass


PROGRAM = """
import multiprocessing, sys, time
from common.recipe import Data
from preprocess.encoding.decoding import decoded
from preprocess.encoding.image_loader import ImageLoader
from preprocess.sources import open_source

loader = ImageLoader(open_source(Data(images=sys.argv[1])), "center", 64)
with decoded(loader, [range(n, n + 10) for n in range(0, 60, 10)], 4) as all:
    images = sum(len(each.positions) for each in all)
    print(images, *(process.pid for process in multiprocessing.active_children()), flush=True)
    time.sleep(float(sys.argv[2]))
"""


def test_decoding_takes_no_room_in_dev_shm(folder: Path) -> None:
    """Of 4 KiB, where one batch has 120."""
    script = 'mount -t tmpfs -o size=4k tmpfs /dev/shm && exec "$@"'
    namespace = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*namespace, script, "sh", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets no test mount another /dev/shm")
    command = [*namespace, script, "sh", sys.executable, "-c", PROGRAM, str(folder), "0"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    assert found.stdout.split()[0] == str(COUNT - 1)


def test_kill_9_ends_the_decoding_processes_too(folder: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(folder), "200"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        _, *children = process.stdout.readline().split()
        process.kill()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)
