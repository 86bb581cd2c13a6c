"""What a second training process brings on this machine: samples a second of two ranks over those of one.

    python benchmarks/ranks.py [--seconds 20] [--rounds 2] [--set FIELD=VALUE ...] [--json FILE]

pipeline/train.py itself, in fp32 on random latents, each rank on one thread: the demo's recipe and FPDM-S/2
at 32 x 32 latents (batch 32). Beside them "apart": two trainings at once, of half the batch each, that exchange
nothing. They show what the cores allow: half a batch takes more than half of the time, and cores share memory. All
take turns; of each the fastest round counts.
"""

import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

from benchmarks.machine import show_machine
from common.command import Parser, count_argument, exit_status_of
from common.loading import load_recipe, parse_recipe
from common.ranks import own_cores
from common.recipe import Recipe, with_world_size
from pipeline.planning.machine import try_training

DEMO = Path(__file__).parents[1] / "recipes/demo.yaml"
DEMO_STEPS_A_LINE = 20  # a line a step would take more from two ranks than from one
SMALL = ("model.size=S", "model.num_classes=10", "train.batch_size=32", "train.max_no_grad_iterations=2")
SMALL += ("train.max_grad_iterations=2", "train.precision=fp32", "train.zero_stage=0")


@dataclass(frozen=True)
class Row:
    """One line of the table: samples a second of one rank, of two, and of two trainings that exchange nothing."""

    network: str
    one: float
    two: float
    apart: float
    ratio: float  # of two to one
    bound: float  # of apart to one
    aim: str

    def __str__(self) -> str:
        speeds = f"{self.one:10.2f} {self.two:10.2f} {self.apart:10.2f}"
        return f"{self.network:24} {speeds} {self.ratio:10.3f} {self.bound:10.3f}  {self.aim}"


def measure(name: str, recipe: Recipe, seconds: float, rounds: int, steps_a_line: int, aim: str) -> Row:
    def speed(recipe: Recipe, ranks: int, copies: int = 1) -> float:
        launched = with_world_size(replace(recipe, launch=replace(recipe.launch, processes=ranks)), ranks)
        with ProcessPoolExecutor(copies) as pool:
            trials = [pool.submit(try_training, launched, seconds, steps_a_line) for _ in range(copies)]
            return sum(trial.result().samples_a_second for trial in trials)

    half = replace(recipe, train=replace(recipe.train, batch_size=recipe.train.batch_size // 2))
    found = [(speed(recipe, 1), speed(recipe, 2), speed(half, 1, copies=2)) for _ in range(rounds)]
    one, two, apart = (max(speeds) for speeds in zip(*found, strict=True))
    return Row(name, one, two, apart, two / one, apart / one, aim)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rounds", type=count_argument, default=2)
    parser.add_argument("--set", metavar="FIELD=VALUE", nargs="*", default=[], help="fields of both recipes")
    parser.add_argument("--json", metavar="FILE", type=Path)
    arguments = parser.parse_args()
    if own_cores() < 2:
        parser.error(f"two ranks need two cores; this process may use {own_cores()}")
    machine = show_machine()
    print(f"{'network':24} {'one rank':>10} {'two ranks':>10} {'apart':>10} {'two / one':>10} {'apart / one':>10}  aim")
    small = parse_recipe("name: benchmark", (*SMALL, *arguments.set))
    demo = load_recipe(DEMO, arguments.set)
    networks = [("the demo's", demo, DEMO_STEPS_A_LINE, ">= 1.7"), ("FPDM-S/2", small, 1, ">= 1.9")]
    rows = []
    for name, recipe, *rest in networks:
        title = f"{name}, batch {recipe.train.batch_size}"
        rows.append(measure(title, recipe, arguments.seconds, arguments.rounds, *rest))
        print(rows[-1], flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({**machine, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
