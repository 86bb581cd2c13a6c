"""Encoding, from images on disk to shards, against the VAE alone and against a loop of one image at a time.

    python benchmarks/encode.py [--vae FOLDER] [--resolution N] [--images N] [--rounds N] [--json FILE]

  vae      the VAE's forward passes alone, over batches that are in memory already: the limit
  ours     preprocess/encoding: listing, decoding and cropping in worker processes, the VAE, shards and checksums
  one      as peers do: open, decode, crop, encode one image, write one .npy, and again
The VAE is loaded before all of them. They take turns; of each one's rounds the fastest counts, by the clock and, on a
CPU, by this process's CPU time: that does not count the decoding processes, nor waiting: it is the share
where decoding has cores of its own. Images are JPEGs of 500 x 375 made of smooth noise. Memory is the peak of a
process that lists a data set of so many images and encodes one shard.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import preprocess.encoding.loop
from benchmarks.machine import show_machine
from common.command import Parser, count_argument, exit_status_of
from common.loading import dump_recipe
from common.recipe import VAE, Data, Launch, Model, Recipe
from preprocess.encoding.encoder import Encoder
from preprocess.encoding.encoding import make_shards, merge_shards, resolve
from preprocess.encoding.image_loader import ImageLoader
from preprocess.images.images import CROPS, decode, from_uint8, to_tensor

AIM = 0.95  # of the VAE's own rate
LISTED = (1_000, 10_000, 100_000)  # images of the data sets whose listing is held in memory
LINKS = 30_000  # to one file: file systems have a limit

MEMORY = """
import sys
from common.loading import parse_recipe
from preprocess.encoding.encoding import make_shards, resolve
recipe = parse_recipe(sys.argv[1])
make_shards(resolve(recipe, download=True), 0, 1_000_000)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("peak", int(peak.split()[1]) / 1024)
"""


def make_images(folder: Path, count: int) -> None:
    random = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{number:06d}.jpg", quality=90)


def ours(recipe: Recipe, encoder: Encoder, folder: Path) -> None:
    preprocess.encoding.loop.Encoder = lambda *_: encoder  # type: ignore[assignment,misc] # loaded before
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        encoding = resolve(replace(recipe, data=replace(recipe.data, shards=str(folder))), download=False)
        make_shards(encoding)
        merge_shards(encoding)


def one_at_a_time(recipe: Recipe, encoder: Encoder, folder: Path) -> None:
    folder.mkdir()
    for path in sorted(Path(recipe.data.images).iterdir()):
        image = to_tensor(CROPS[recipe.data.crop](decode(path.read_bytes()), recipe.data.resolution))
        np.save(folder / f"{path.stem}.npy", encoder.encode(image[None]).half().numpy()[0])


def measure(recipe: Recipe, rounds: int, scratch: Path) -> dict[str, dict[str, float]]:
    """Images a second of each contender, by each clock."""
    encoder, count = Encoder(recipe.vae), len(list(Path(recipe.data.images).iterdir()))
    source = resolve(recipe, download=False).source
    loader, size = ImageLoader(source, recipe.data.crop, recipe.data.resolution), recipe.vae.batch_size
    batches = [loader[range(start, min(start + size, count))].images for start in range(0, count, size)]

    def vae(_: Path) -> None:
        for images in batches:
            assert images is not None
            encoder.moments(from_uint8(images.to(encoder.device)))
        if encoder.device.type == "cuda":
            torch.cuda.synchronize()

    calls: dict[str, Callable[[Path], None]] = {
        "vae": vae,
        "ours": lambda folder: ours(recipe, encoder, folder),
        "one": lambda folder: one_at_a_time(recipe, encoder, folder),
    }
    clocks = {"clock": time.perf_counter} | ({"CPU": time.process_time} if encoder.device.type == "cpu" else {})
    fastest = {clock: dict.fromkeys(calls, float("inf")) for clock in clocks}
    for number in range(rounds + 1):
        for name, call in calls.items():
            started = {clock: now() for clock, now in clocks.items()}
            call(scratch / f"{name}-{number}")
            for clock, now in clocks.items() if number else ():  # the first round warms up
                fastest[clock][name] = min(fastest[clock][name], now() - started[clock])
    return {clock: {name: count / seconds for name, seconds in of.items()} for clock, of in fastest.items()}


def peak_memory(recipe: Recipe, count: int, scratch: Path) -> float:
    """MiB, of a process that lists `count` images and encodes the first shard."""
    folder, originals = scratch / f"listed-{count}", sorted(Path(recipe.data.images).iterdir())
    folder.mkdir()
    for number in range(count):
        os.link(originals[number // LINKS % len(originals)], folder / f"{number:09d}.jpg")
    data = replace(recipe.data, images=str(folder), shards=str(scratch / f"shards-{count}"), shard_samples=32)
    arguments = [sys.executable, "-c", MEMORY, dump_recipe(replace(recipe, data=data))]
    found = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return float(found.stdout.split("peak")[1])


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--vae", default=str(Path(__file__).parents[1] / "assets/vae-demo"))
    parser.add_argument("--downsampling", type=count_argument, default=4, help="of the VAE (4)")
    parser.add_argument("--resolution", type=count_argument, default=128, help="pixels (128)")
    parser.add_argument("--images", type=count_argument, default=256, help="(256)")
    parser.add_argument("--batch-size", type=count_argument, default=32, help="(32)")
    parser.add_argument("--workers", type=count_argument, default=1, help="decoding processes (1)")
    parser.add_argument("--rounds", type=count_argument, default=8, help="rounds that count, after one to warm up (8)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = show_machine()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        make_images(scratch / "images", arguments.images)
        recipe = Recipe(
            name="benchmark",
            data=Data(
                images=str(scratch / "images"),
                shards=str(scratch / "shards"),
                resolution=arguments.resolution,
                flips=False,
                shard_samples=4 * arguments.batch_size,
            ),
            vae=VAE(path=arguments.vae, downsampling=arguments.downsampling, batch_size=arguments.batch_size),
            model=Model(num_classes=1),
            launch=Launch(cpus_per_process=arguments.workers),
        )
        rates = measure(recipe, arguments.rounds, scratch)
        memory = {count: peak_memory(recipe, count, scratch) for count in LISTED}
    print(f"{arguments.resolution} px, batch {arguments.batch_size}, {arguments.workers} decoding processes; images/s")
    for clock, of in rates.items():
        share, times = of["ours"] / of["vae"], of["ours"] / of["one"]
        print(f"by {clock:5}  vae {of['vae']:8.1f}  ours {of['ours']:8.1f}  one {of['one']:8.1f}", end="  ")
        print(f"ours is {share:.3f} of vae (aim: at least {AIM}), {times:.2f} times one")
    for count, peak in memory.items():
        print(f"peak memory with {count:9,} images listed: {peak:7.1f} MiB")
    if arguments.json:
        table = {"images_per_second": rates, "share": share, "aim": AIM, "peak_mib": memory}
        record = table | machine | {"arguments": vars(arguments) | {"json": None}}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
