"""What a run writes while it trains."""

import json
import math
from pathlib import Path

from common.files import atomic_write
from common.recipe import Recipe


class TrainingLog:
    """`metrics.jsonl`, a line a report, and TensorBoard. Lines after the checkpoint resumed from are taken back."""

    def __init__(self, recipe: Recipe, samples_seen: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path: Path = recipe.folder / "metrics.jsonl"
        kept = []
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _samples_of(line) <= samples_seen]
        with atomic_write(self.path) as file:
            file.write_text("".join(f"{line}\n" for line in kept))
        self.tensorboard = SummaryWriter(str(recipe.folder / "tensorboard"), purge_step=samples_seen + 1)

    def write(self, **values: float | None) -> None:
        with open(self.path, "a") as lines:
            lines.write(json.dumps(values) + "\n")
        for name, value in values.items():
            if value is not None:
                self.tensorboard.add_scalar(f"train/{name}", value, values["samples"])
        self.tensorboard.flush()


def _samples_of(line: str) -> float:
    """Samples of a log line; infinity for one that a kill cut short, so that it is taken back."""
    try:
        return json.loads(line)["samples"]
    except ValueError:
        return math.inf
