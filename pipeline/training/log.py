"""What a run writes and shows while it trains."""

import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from common.errors import UserError
from common.files import atomic_write, content_key, disk_errors_as_user_errors, sync
from common.log_lines import append_line, log_line, read_log
from common.recipe import Recipe

LINE_EVERY_SECONDS = 10.0

Values = dict[str, float | int | None]


class TrainingLog:
    """`metrics.jsonl` and `events.jsonl`, a line each; TensorBoard and Weights & Biases where the recipe asks for them.

    Lines after the checkpoint resumed from are taken back. Raises UserError where wandb is asked for and not installed.
    """

    def __init__(self, recipe: Recipe, samples_seen: int, identity: dict[str, Any]) -> None:
        self.metrics, self.events = recipe.folder / "metrics.jsonl", recipe.folder / "events.jsonl"
        for path in (self.metrics, self.events):
            _take_back(path, samples_seen)
        self.tensorboard = self.wandb = None
        if recipe.train.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(recipe.folder / "tensorboard"), purge_step=samples_seen + 1)
        if recipe.train.log.wandb_project:
            self.wandb = _start_wandb(recipe, identity)

    def write(self, values: Values, **words: str) -> None:
        """One log line; `values["samples"]` is where it stands, `words` belong to it."""
        append_line(self.metrics, values | words)
        samples = values["samples"]
        numbers = {f"train/{name}": value for name, value in values.items() if value is not None}
        if self.tensorboard is not None:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, samples)
            self.tensorboard.flush()
        if self.wandb is not None:
            self.wandb.log(numbers, step=samples)

    def sync(self) -> None:
        """Puts the lines on disk. Raises UserError where it does not take them."""
        with disk_errors_as_user_errors(self.metrics):
            for path in (self.metrics, self.events):
                if path.exists():
                    sync(path)

    def event(self, values: dict[str, Any]) -> None:
        """Something out of the ordinary, kept and said."""
        append_line(self.events, values)
        tqdm.write(f"train: {json.dumps(values)}", file=sys.stderr)

    def picture(self, path: Path, samples: int) -> None:
        """A grid of samples, which lies at `path` already."""
        if self.tensorboard is not None:
            import numpy as np
            from PIL import Image

            with Image.open(path) as image:
                self.tensorboard.add_image("samples", np.asarray(image), samples, dataformats="HWC")
        if self.wandb is not None:
            self.wandb.log({"samples": _import_wandb().Image(str(path))}, step=samples)

    def close(self) -> None:
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def _start_wandb(recipe: Recipe, identity: dict[str, Any]) -> Any:
    """The same run however often it is queued again: its id is a function of what the run is."""
    from dataclasses import asdict

    return _import_wandb().init(
        project=recipe.train.log.wandb_project,
        name=recipe.name,
        id=content_key([str(recipe.folder), identity]),
        resume="allow",
        dir=str(recipe.folder),
        config=asdict(recipe),
    )


def _import_wandb() -> ModuleType:
    try:
        import wandb
    except ImportError:
        raise UserError(
            "train.log.wandb_project: the package wandb is not installed; pip install wandb, or set it to null"
        ) from None
    return wandb


def _take_back(path: Path, samples_seen: int) -> None:
    """Drops the lines of steps that will be done again; a damaged one too, with a warning."""
    if not path.exists():
        return
    kept = [line for line in read_log(path) if line["samples"] <= samples_seen]
    with atomic_write(path) as file:
        file.write_text("".join(map(log_line, kept)))


class Progress:
    """A bar for a person who watches a terminal; a line now and then in a log file; nothing on other ranks."""

    def __init__(self, total: int, samples_seen: int, rank: int) -> None:
        watched = sys.stderr.isatty()
        self.lines = rank == 0 and not watched
        self.total, self.said = total, 0.0
        self.bar = tqdm(
            total=total,
            initial=samples_seen,
            unit="sample",
            desc="train",
            disable=rank != 0 or not watched,
            smoothing=0.05,
        )

    def advance(self, samples: int) -> None:
        self.bar.update(samples)

    def show(self, values: Values) -> None:
        """With each log line."""
        if values["loss"] is None:
            return
        self.bar.set_postfix(loss=f"{values['loss']:.4f}")
        samples, speed = values["samples"] or 0, values["samples_per_second"]
        due = time.monotonic() - self.said > LINE_EVERY_SECONDS or samples == self.total
        if self.lines and due:
            left = f", {tqdm.format_interval((self.total - samples) / speed)} left" if speed else ""
            print(
                f"train: {samples:,} of {self.total:,} samples, loss {values['loss']:.4f}, {speed:.1f} samples/s{left}",
                flush=True,
            )
            self.said = time.monotonic()

    def close(self) -> None:
        self.bar.close()
