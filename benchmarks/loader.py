"""Random, verified reads of latents against the other ways to store and read them.

    python benchmarks/loader.py [--samples N] [--rounds N] [--json FILE]

Makes N latents of (8, 32, 32) float16, as the Stable Diffusion VAE makes of 256 px images, in each format, and reads
all of them in random order (plain WebDataset: as its reader gives them), in batches of 256, from a warm page cache:
  shards         preprocess/shards: every sample's CRC-32 verified before it is used
  memory map     the same samples from one array on disk, nothing verified: what verifying costs
  npy            a file a sample through torch's DataLoader, as peers keep them; nothing verified
  webdataset     webdataset.WebDataset over the same tars, decoded by np.frombuffer
  ffcv           FFCV's own loader over preprocess/beton.py's file, where FFCV is installed; nothing verified
In the reader's process (0 workers; training reads shards so) and with a DataLoader's one worker process, which for
FFCV is its thread. The order is drawn before the clock starts. The contenders take turns; of each one's rounds the
fastest counts, and it is compared with npy at one worker. Opening is a process of its own that opens an index of 1.28 M
synthetic latents.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.machine import show_machine
from common.command import Parser, count_argument, exit_status_of
from common.files import sha256_file
from fpdm import rng
from preprocess import beton
from preprocess.shards import SAMPLE, LatentShards, Sample, rows_name, shard_name, write_index, write_shard

SHAPE = (8, 32, 32)
BATCH = 256
SHARD = 4096
IMAGENET, CLASSES = 1_281_167, 1000
AIM = 40  # times the samples/s of npy at one worker

OPENING = """
import sys, time
started = time.perf_counter()
from preprocess.shards import LatentShards
imported = time.perf_counter()
shards = LatentShards(sys.argv[1])
shards.labels_at([0, len(shards) - 1])
opened = time.perf_counter()
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # of this program alone
print(imported - started, opened - imported, int(peak.split()[1]) / 1024)
"""


@dataclass(frozen=True)
class Row:
    contender: str
    workers: int
    samples_per_second: float
    times_npy: float


def sample(position: int) -> Sample:
    moments = np.random.default_rng(position).standard_normal(SHAPE, np.float32).astype(np.float16)
    return Sample(position, f"{position}.png", position % CLASSES, 256, 256, np.abs(moments), None)


def make(folder: Path, count: int) -> None:
    for name in ("shards", "npy"):
        (folder / name).mkdir()
    records = []
    array = np.lib.format.open_memmap(folder / "all.npy", "w+", np.float16, (count, *SHAPE))
    for number, start in enumerate(range(0, count, SHARD)):
        samples = [sample(position) for position in range(start, min(start + SHARD, count))]
        records.append(write_shard(folder / "shards", number, samples, {"flips": False, "shard_samples": SHARD}))
        for each in samples:
            array[each.position] = each.moments
            np.save(folder / "npy" / f"{each.position}.npy", each.moments)
    array.flush()
    write_index(folder / "shards", records, SHAPE, [str(label) for label in range(CLASSES)])


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """Batches of any reader by their indices, for a DataLoader's worker."""

    def __init__(self, read: Any) -> None:
        self.read = read

    def __getitem__(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        return self.read(indices)


@dataclass
class FromShards:
    shards: LatentShards

    def __call__(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.shards.gather(indices)), torch.from_numpy(self.shards.labels_at(indices))


@dataclass
class FromMemoryMap:
    path: Path

    def __post_init__(self) -> None:
        self.array = np.load(self.path, mmap_mode="r")

    def __call__(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.array[indices]), torch.from_numpy(indices % CLASSES)


class Files(Dataset[tuple[Tensor, int]]):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(np.load(self.folder / f"{index}.npy")), index % CLASSES


# From the order of an epoch's samples, which a WebDataset's and FFCV's reader choose themselves, to its batches.
Epoch = Callable[[np.ndarray], Iterable[tuple[Tensor, Tensor]]]


def unchanged(value: Any) -> Any:
    return value


def by_batches(read: Any, count: int, workers: int) -> Epoch:
    def epoch(indices: np.ndarray) -> Iterable[Any]:
        batches = np.split(indices, range(BATCH, count, BATCH))
        if not workers:
            return map(read, batches)
        return DataLoader(Batches(read), batch_size=None, sampler=batches, num_workers=1, collate_fn=unchanged)

    return epoch


def by_files(folder: Path, workers: int) -> Epoch:
    return lambda indices: DataLoader(Files(folder), BATCH, sampler=indices.tolist(), num_workers=workers)


def by_webdataset(folder: Path, count: int, workers: int) -> Epoch:
    import webdataset

    offset = 128  # of the numbers in an npy file of this shape

    def decode(row: dict[str, Any]) -> tuple[Tensor, int]:
        moments = np.frombuffer(row["moments.npy"], np.float16, offset=offset).reshape(SHAPE)
        return torch.from_numpy(moments.copy()), int(row["cls"])

    urls = [str(folder / shard_name(number)) for number in range(-(-count // SHARD))]
    dataset = webdataset.WebDataset(urls, shardshuffle=False).map(decode).batched(BATCH)
    return lambda indices: DataLoader(dataset, batch_size=None, num_workers=workers)


def by_ffcv(path: Path) -> Epoch:
    """FFCV's loader reads ahead with a thread of its own, which stands for the worker."""
    from ffcv.fields.decoders import IntDecoder, NDArrayDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import Squeeze, ToTensor, View

    pipelines = {
        "moments": [NDArrayDecoder(), ToTensor(), View(torch.float16)],
        "label": [IntDecoder(), ToTensor(), Squeeze()],
    }
    order, kept = OrderOption.RANDOM, {"os_cache": True, "drop_last": False}
    loader = Loader(str(path), BATCH, num_workers=1, order=order, seed=0, pipelines=pipelines, **kept)
    return lambda indices: loader


def contenders(folder: Path, count: int) -> dict[tuple[str, int], Epoch]:
    """By name and number of workers."""
    found: dict[tuple[str, int], Epoch] = {}
    for workers in (0, 1):
        found["shards", workers] = by_batches(FromShards(LatentShards(folder / "shards")), count, workers)
        found["memory map", workers] = by_batches(FromMemoryMap(folder / "all.npy"), count, workers)
        found["npy", workers] = by_files(folder / "npy", workers)
        found["webdataset", workers] = by_webdataset(folder / "shards", count, workers)
    if find_spec("ffcv"):
        beton.convert(folder / "shards")
        found["ffcv", 1] = by_ffcv(folder / "shards" / beton.FOLDER / beton.BETON)
    return found


def measure(calls: dict[tuple[str, int], Epoch], count: int, rounds: int) -> list[Row]:
    """Samples a second of each contender's fastest round; the first round warms up and does not count."""
    fastest = dict.fromkeys(calls, 0.0)
    for epoch in range(rounds + 1):
        indices = rng.permute(0, f"benchmark/{epoch}", torch.arange(count), count).numpy()
        for key, batches_of in calls.items():
            started = time.perf_counter()
            seen = sum(len(labels) for _, labels in batches_of(indices))
            seconds = time.perf_counter() - started
            if seen != count:
                raise RuntimeError(f"{key} read {seen} samples of {count}")
            if epoch:
                fastest[key] = max(fastest[key], count / seconds)
    return [Row(*key, speed, speed / fastest["npy", 1]) for key, speed in fastest.items()]


def synthetic_folder(folder: Path, count: int, shard_samples: int) -> None:
    """An index over `count` samples, whose shards have the right sizes, no content, and take no room on the disk."""
    stride = 512 + -(-(128 + 2 * int(np.prod(SHAPE))) // 512) * 512 + 2 * 1024
    records = []
    for number, start in enumerate(range(0, count, shard_samples)):
        rows = np.zeros(min(shard_samples, count - start), SAMPLE)
        rows["position"] = np.arange(start, start + len(rows))
        rows["offset"] = 640 + stride * np.arange(len(rows))
        rows["shard"], rows["label"] = number, rows["position"] % CLASSES
        np.save(folder / rows_name(shard_name(number)), rows)
        with open(folder / shard_name(number), "wb") as file:
            file.truncate(len(rows) * stride)
        known = {
            "settings": {"flips": False},
            "nsamples": len(rows),
            "filesize": len(rows) * stride,
            "sha256": "0" * 64,
        }
        hashed = sha256_file(folder / rows_name(shard_name(number)))
        records.append({**known, "samples_sha256": hashed, "rejected": [], "channel_sums": [[0.0] * 4, [1.0] * 4]})
    write_index(folder, records, SHAPE, [str(label) for label in range(CLASSES)])


def opening(folder: Path) -> dict[str, float]:
    """Seconds and MiB of a process that opens a folder of as many latents as ImageNet has images."""
    synthetic_folder(folder, IMAGENET, 8192)
    command = [sys.executable, "-c", OPENING, str(folder)]
    imports, opens, memory = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return {"import_seconds": float(imports), "open_seconds": float(opens), "memory_mib": float(memory)}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--samples", type=count_argument, default=20_000)
    parser.add_argument("--rounds", type=count_argument, default=8, help="that count, after one to warm up (8)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = show_machine()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make(folder, arguments.samples)
        rows = measure(contenders(folder, arguments.samples), arguments.samples, arguments.rounds)
        (folder / "imagenet").mkdir()
        opened = opening(folder / "imagenet")
    print(f"{'reader':12} {'workers':>7} {'samples/s':>10} {'x npy':>7}")
    for row in rows:
        aim = f"  aim: at least {AIM}" if (row.contender, row.workers) == ("shards", 0) else ""
        print(f"{row.contender:12} {row.workers:7} {row.samples_per_second:10,.0f} {row.times_npy:7.1f}{aim}")
    print(
        f"opening {IMAGENET:,} latents: {opened['open_seconds']:.2f} s (aim: under 2; imports before it "
        f"{opened['import_seconds']:.2f}), {opened['memory_mib']:.0f} MiB at most (aim: under 300)"
    )
    if arguments.json:
        record = {**machine, "samples": arguments.samples, "rows": [asdict(row) for row in rows], "opening": opened}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
