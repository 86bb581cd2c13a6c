"""What training costs beside the network: against the step itself, and against a bare PyTorch loop.

    python benchmarks/train.py [--size B] [--batch 4] [--rounds 6] [--json FILE]

One rank trains FPDM-<size>/2 in fp32 on random latents under DeepSpeed (stage 0, as one rank in fp32 always), with one
average, and a log line every step (a hundred times as often as usual); n = 0 and m = 1, the least work that a network's
step can be, so that all else weighs most.

  outside    share of a step's CPU time that is neither forward, backward nor optimiser: reading, checking and drawing
             the next batch (on its thread), averages, exchange between ranks, logging
  bare       our samples a second over those of a loop of forward, loss, backward and AdamW alone on the same network
             (its linear layers, oneDNN's, too), latents in memory, noise from torch.randn, no averages, no clipping, no
             logging, no DeepSpeed; the two take turns step by step, and of each the fastest step counts

On one thread, in CPU time of this process: the rest is the machine's other load.
"""

import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch

from benchmarks.machine import show_machine
from common.command import Parser, count_argument, exit_status_of
from common.loading import parse_recipe
from common.recipe import Recipe, denoiser_config, diffusion, with_world_size
from common.run_folder import RunFolder
from fpdm.denoiser import build_denoiser
from pipeline.training.data import open_shards
from pipeline.training.distributed import process_group
from pipeline.training.log import ProgressBar
from pipeline.training.trainer import Trainer
from preprocess.shards import Sample, write_index, write_shard

MOMENTS = (8, 32, 32)
NETWORK = ("forward", "backward", "optimizer")
WARM_UP = 2  # steps: the first ones allocate


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    measurement: str
    unit: str
    ours: float
    theirs: float
    ratio: float
    aim: str

    def __str__(self) -> str:
        return (
            f"{self.measurement:36} {self.ours:10.4g} {self.theirs:10.4g} {self.unit:10} {self.ratio:7.4f}  {self.aim}"
        )


def make_shards(folder: Path, samples: int) -> None:
    """Random moments in one shard, in the project's own format."""
    settings = {"flips": False, "vae": {"scaling_factor": 0.18215, "shift_factor": 0.0}}
    draw = np.random.default_rng(0)

    def outcomes() -> list[Sample]:
        moments = np.abs(draw.normal(size=(samples, *MOMENTS))).astype(np.float16)
        return [Sample(number, f"{number}", number % 10, 256, 256, moments[number], None) for number in range(samples)]

    folder.mkdir()
    record = write_shard(folder, 0, outcomes(), settings)
    write_index(folder, [record], MOMENTS, [str(label) for label in range(10)])


def make_recipe(folder: Path, size: str, batch: int, steps: int) -> Recipe:
    overrides = (
        *(f"runs={folder / 'runs'}", f"data.shards={folder / 'shards'}", "data.flips=false"),
        *(f"model.size={size}", "model.num_classes=10", "train.precision=fp32"),
        *(
            f"train.batch_size={batch}",
            f"train.log.every_samples={batch}",
            f"train.total_samples={batch * (steps + 1)}",
        ),
        *("train.max_no_grad_iterations=0", "train.max_grad_iterations=1"),
    )
    return with_world_size(parse_recipe("name: benchmark", overrides), 1)


class BareLoop:
    """The least that trains the same network."""

    def __init__(self, recipe: Recipe) -> None:
        self.batch, self.diffusion = recipe.train.batch_size, diffusion(recipe)
        self.model = build_denoiser(denoiser_config(recipe), seed=0)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
        self.latents = torch.randn(64, MOMENTS[0] // 2, *MOMENTS[1:])

    def step(self) -> None:
        latents = self.latents[torch.randint(64, (self.batch,))]
        noise, timesteps = torch.randn_like(latents), torch.randint(1000, (self.batch,))
        noisy = self.diffusion.add_noise(latents, noise, timesteps)
        output = self.model(noisy, timesteps, torch.randint(10, (self.batch,)), iterations=(0, 1)).output
        self.diffusion.loss(output, latents, noise, timesteps)["loss"].mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def measure(size: str, batch: int, rounds: int) -> list[Row]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make_shards(folder / "shards", 256)
        recipe = make_recipe(folder, size, batch, WARM_UP + rounds)
        trainer = Trainer(recipe, open_shards(recipe), stack.enter_context(process_group()))
        trainer.throughput.watch.clock = time.thread_time  # the batches' thread is not the network's
        stack.enter_context(trainer.open())
        stack.enter_context(closing(trainer.batches))
        trainer.progress = ProgressBar(trainer.total, 0, rank=1)  # which prints nothing
        bare = BareLoop(recipe)
        ours, outside, theirs = [], [], []
        for number in range(WARM_UP + rounds):
            start = time.process_time()
            trainer.step()
            middle = time.process_time()
            bare.step()
            end = time.process_time()
            line = json.loads((RunFolder(recipe.folder).log).read_text().splitlines()[-1])
            if number >= WARM_UP:
                ours.append(middle - start)
                theirs.append(end - middle)
                outside.append(middle - start - sum(line[f"{part}_seconds"] for part in NETWORK))
        name = f"FPDM-{size}/2, batch {batch}"
        best = min(range(rounds), key=lambda number: ours[number])
        return [
            Row(
                f"{name}: outside the network",
                "s a step",
                outside[best],
                ours[best],
                outside[best] / ours[best],
                "<= 0.03",
            ),
            Row(
                f"{name}: against a bare loop",
                "samples/s",
                *(batch / min(ours), batch / min(theirs), min(theirs) / min(ours), ">= 0.95"),
            ),
        ]


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--size", default="B", choices=["S", "B", "L", "XL"])
    parser.add_argument("--batch", type=count_argument, default=4)
    parser.add_argument("--rounds", type=count_argument, default=6)
    parser.add_argument("--json", metavar="FILE", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)  # of the bare loop alone
    machine = show_machine()
    print(f"{'measurement':36} {'ours':>10} {'theirs':>10} {'unit':10} {'ratio':>7}  aim")
    rows = measure(arguments.size, arguments.batch, arguments.rounds)
    for row in rows:
        print(row)
    if arguments.json:
        arguments.json.write_text(json.dumps({**machine, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
