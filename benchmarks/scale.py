"""Simulates training on LAION-5B, the paper's own outlook: 5e9 samples on 4,096 ranks of 512 nodes.

    python benchmarks/scale.py [--samples N] [--ranks N] [--shard-samples N] [--json FILE]

The index is of full size, and reading is the real thing: recipe, stream, block order, cache, checksums, down to the
batch. Only the storage is played: an fsspec file system that gives the bytes of one real shard for every shard. What a
network adds is the bytes fetched over its speed; both are printed apart.
  first batch   of a rank process, after imports, at a position in the middle of the second epoch; the first rank of a
                node fetches the shards of the node's first window, the second one finds them
  memory        peak of the rank process, and what it had before it opened the data
  shards open   mapped by the rank after its first batch
  evenness      samples a rank in an epoch; shards a node fetches in an epoch
  exactly once  proved by parts: lanes tile the epoch, blocks are permuted one to one (all of them are looked at), and
                in sampled windows the positions give each sample of the window's blocks once
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch

from benchmarks.machine import show_machine
from common.command import Parser, count_argument, exit_status_of
from common.loading import parse_recipe
from common.recipe import Recipe, diffusion
from pipeline.training.data import Stream
from pipeline.training.order import BlockOrder
from preprocess.from_data import open_latents
from preprocess.shards import INDEX, Sample, rows_name, shard_name, write_shard
from preprocess.shards.format import VERSION
from preprocess.shards.forms import Index, Settings, write_index_file

SHAPE = (8, 32, 32)
RANKS_A_NODE = 8
SHARE = 16  # samples a rank and step
MIXED = 4
CLASSES = 1000


class Repeated(fsspec.AbstractFileSystem):
    """A folder in which every shard is the first one."""

    protocol = "repeated"

    def open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        first = shard_name(0) if path.endswith(".tar") else rows_name(shard_name(0))
        return open(Path(path).with_name(first), mode)

    def cat_file(self, path: str, *_: Any, **__: Any) -> bytes:
        return Path(path).read_bytes()


def make(folder: Path, samples: int, shard_samples: int) -> int:
    """One real shard and the index over as many as it takes. Returns bytes of a shard with its rows."""
    settings: Settings = {
        "flips": False,
        "shard_samples": shard_samples,
        "vae": {"scaling_factor": 0.18215, "shift_factor": 0.0},
    }
    moments = np.abs(np.random.default_rng(0).standard_normal((64, *SHAPE), np.float32)).astype(np.float16)
    made = (Sample(i, f"{i}.png", i % CLASSES, 256, 256, moments[i % 64], None) for i in range(shard_samples))
    record = write_shard(folder, 0, made, settings)
    index: Index = {
        "version": VERSION,
        "wids_version": 1,
        "shardlist": [
            {
                "url": shard_name(number),
                "nsamples": shard_samples,
                "filesize": record["filesize"],
                "sha256": record["sha256"],
                "samples_sha256": record["samples_sha256"],
            }
            for number in range(samples // shard_samples)
        ],
        "settings": settings,
        "class_names": [str(label) for label in range(CLASSES)],
        "shape": list(SHAPE),
        "found": samples,
        "accepted": samples,
        "rejected": [],
        "left_out": {},
        "warnings": [],
        "samples_sha256": "0" * 64,
        "latents": {"mean": [], "std": []},
        "stamp": "",
    }
    write_index_file(folder, index)
    return record["filesize"] + (folder / rows_name(shard_name(0))).stat().st_size


def recipe(folder: Path, ranks: int) -> Recipe:
    return parse_recipe(
        f"""
name: scale
data: {{shards: "repeated://{folder}", cache: {folder / "cache"}, order: block, mixed_blocks: {MIXED},
        lanes: {ranks // RANKS_A_NODE}, flips: false}}
train: {{batch_size: {ranks * SHARE}}}
"""
    )


def memory(field: str) -> float:
    """MiB: VmRSS now, or VmHWM, its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def first_batch(folder: Path, ranks: int, rank: int) -> dict[str, float]:
    """What one rank process does until it holds its first batch, at a step in the middle of the second epoch."""
    torch.set_num_threads(1)
    fsspec.register_implementation("repeated", Repeated)
    chosen, before = recipe(folder, ranks), memory("VmRSS")
    started = time.perf_counter()
    shards = open_latents(chosen.data)
    opened = time.perf_counter()
    stream = Stream(chosen, shards, diffusion(chosen))
    step = len(shards) * 3 // 2 // chosen.train.batch_size
    first = step * chosen.train.batch_size + rank * SHARE
    batch = stream.batch(torch.arange(first, first + SHARE))
    ready = time.perf_counter()
    stream.batch(chosen.train.batch_size + torch.arange(first, first + SHARE))
    second = time.perf_counter()
    assert batch.latents.shape == (SHARE, SHAPE[0] // 2, *SHAPE[1:])
    return {
        "rank": rank,
        "open_seconds": opened - started,
        "first_batch_seconds": ready - started,
        "next_batch_seconds": second - ready,
        "memory_before_mib": before,
        "memory_peak_mib": memory("VmHWM"),
        "shards_open": len(shards._maps),
    }


def in_processes(folder: Path, ranks: int) -> list[dict[str, float]]:
    """Ranks 0 and 1 of one node, one after the other, and a rank of the last node."""
    found = []
    for rank in (0, 1, ranks - 1):
        command = [sys.executable, __file__, "--ranks", str(ranks), "--one-rank", str(rank), str(folder)]
        found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return found


def evenness(order: BlockOrder, ranks: int) -> dict[str, float]:
    """Of the second epoch, by the order's own closed form: samples a rank, and shards a node fetches."""
    by_rank = BlockOrder(order.seed, order.size, order.batch_size, order.block, order.mixed, ranks)
    numbers = {}
    for name, each in (("rank", by_rank), ("node", order)):
        lanes = torch.arange(each.lanes)
        first, last = (torch.full_like(lanes, epoch * each.size) for epoch in (1, 2))
        counts = each._in_lane(last, lanes) - each._in_lane(first, lanes)
        starts = each._below(last, lanes) - each._below(first, lanes)
        # Lanes tile the epoch: each begins where the one before it ends.
        assert torch.equal(starts, torch.cumsum(counts, 0) - counts)
        assert int(counts.sum()) == each.size
        numbers |= {f"samples_a_{name}_least": int(counts.min()), f"samples_a_{name}_most": int(counts.max())}
    touched = (
        (starts + counts - 1) // order.block - starts // order.block + 1
    )  # blocks that lie in the lane, also in part
    return numbers | {
        "shards_a_node_least": int(touched.min()),
        "shards_a_node_most": int(touched.max()),
        "fetched_of_all_shards": int(touched.sum()) / (order.size // order.block),
    }


def exactly_once(order: BlockOrder, windows: int) -> dict[str, int]:
    """Looks at every block of an epoch and at every position of some windows. Raises AssertionError for a fault."""
    full = order.size // order.block
    starts = order._in_blocks(1, torch.arange(full) * order.block)
    assert torch.equal(starts.sort().values, torch.arange(full) * order.block)
    generator = np.random.default_rng(0)
    run, looked_at = order.batch_size // order.lanes, 0
    for lane in generator.choice(order.lanes, windows, replace=False).tolist():
        lanes = torch.tensor([lane])
        before, after = (int(order._in_lane(torch.tensor([epoch * order.size]), lanes)) for epoch in (1, 2))
        window = int(generator.integers((after - before) // order.window))
        places = before + window * order.window + torch.arange(order.window)
        positions = places // run * order.batch_size + lane * run + places % run
        assert torch.equal(positions // order.size, torch.ones_like(positions))
        indices = order.indices(positions)
        assert len(indices.unique()) == order.window
        # The window lies in its blocks and nowhere else: at most one more than `mixed`, the first and last in part.
        assert len((indices // order.block).unique()) <= order.mixed + 1
        looked_at += len(positions)
    return {"blocks": full, "positions": looked_at, "windows": windows}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--samples", type=count_argument, default=5_000_000_000)
    parser.add_argument("--ranks", type=count_argument, default=4096)
    parser.add_argument(
        "--shard-samples", type=count_argument, default=32_000, help="a divisor of --samples (32,000: 0.6 GB)"
    )
    parser.add_argument("--windows", type=count_argument, default=16, help="looked at for exactly once (16)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--one-rank", nargs=2, metavar=("RANK", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one_rank:
        rank, folder = arguments.one_rank
        print(json.dumps(first_batch(Path(folder), arguments.ranks, int(rank))))
        return
    machine = show_machine()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shard_bytes = make(folder, arguments.samples, arguments.shard_samples)
        index_bytes = (folder / INDEX).stat().st_size
        processes = in_processes(folder, arguments.ranks)
    lanes = arguments.ranks // RANKS_A_NODE
    order = BlockOrder(0, arguments.samples, arguments.ranks * SHARE, arguments.shard_samples, MIXED, lanes)
    found: dict[str, Any] = {
        "samples": arguments.samples,
        "ranks": arguments.ranks,
        "shards": arguments.samples // arguments.shard_samples,
        "shard_bytes": shard_bytes,
        "index_bytes": index_bytes,
        "processes": processes,
        "evenness": evenness(order, arguments.ranks),
        "exactly_once": exactly_once(order, arguments.windows),
    }
    show(found)
    if arguments.json:
        arguments.json.write_text(json.dumps(machine | found, indent=1) + "\n")


def show(found: dict[str, Any]) -> None:
    print(
        f"{found['samples']:,} samples in {found['shards']:,} shards of {found['shard_bytes'] / 1e9:.2f} GB, index of "
        f"{found['index_bytes'] / 1e6:.0f} MB; {found['ranks']:,} ranks, {RANKS_A_NODE} a node; {MIXED} shards mixed"
    )
    print(f"{'rank':>6} {'open':>8} {'first batch':>12} {'next batch':>11} {'memory':>24} {'shards open':>12}")
    for each in found["processes"]:
        memory_used = f"{each['memory_before_mib']:.0f} -> {each['memory_peak_mib']:.0f} MiB"
        print(
            f"{each['rank']:6} {each['open_seconds']:6.2f} s {each['first_batch_seconds']:10.2f} s "
            f"{1000 * each['next_batch_seconds']:8.1f} ms {memory_used:>24} {each['shards_open']:12}"
        )
    even, once = found["evenness"], found["exactly_once"]
    print(
        f"a node fetches {MIXED * found['shard_bytes'] / 1e9:.1f} GB before its first batch, here from this disk onto "
        "itself; a network's time is to be added"
    )
    print(f"samples a rank in an epoch: {even['samples_a_rank_least']:,} to {even['samples_a_rank_most']:,}")
    print(
        f"shards a node in an epoch: {even['shards_a_node_least']} to {even['shards_a_node_most']}; all nodes together "
        f"fetch {even['fetched_of_all_shards']:.4f} times the data set"
    )
    print(
        f"exactly once: holds for all {once['blocks']:,} blocks and for the {once['positions']:,} positions of "
        f"{once['windows']} windows"
    )


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
