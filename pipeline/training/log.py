"""The log of a run while it trains: `metrics.jsonl`, `events.jsonl`, TensorBoard, Weights & Biases, the terminal."""

import json
import math
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
from common.run_folder import RunFolder
from pipeline.training.schedule import StepIterations, learning_rate
from pipeline.training.state import TrainState
from pipeline.training.step import StepResult
from pipeline.training.throughput import RESIDUAL
from pipeline.training.warnings import long_silence

LINE_EVERY_SECONDS = 10.0
TIMED_STEPS = 3  # before a long silence is announced

Values = dict[str, float | int | str | None]


def log_values(
    recipe: Recipe,
    state: TrainState,
    result: StepResult,
    iterations: StepIterations,
    speed: dict[str, float | None],
    distance: tuple[float, str] | None,
) -> Values:
    """One line of `metrics.jsonl`: means of the interval; gradient norm, residual and counts of its last step.

    Args:
        state: after that step.
        result: `sums` over all ranks.
        iterations: those of that step.
        speed: `Throughput.read`.
        distance: the Fréchet distance of the preview and its name, if it was measured.
    """
    batch_size = recipe.train.batch_size
    values: Values = {
        "samples": state.samples_seen,
        "step": state.samples_seen // batch_size,
        **state.interval.means(),
        "residual": float(result.sums[RESIDUAL]) if recipe.model.kind == "fpdm" else None,
        "gradient_norm": result.norm,
        "learning_rate": learning_rate(recipe.train, state.samples_seen - batch_size, state.seconds),
        "no_grad_iterations": iterations.without_graph,
        "grad_iterations": iterations.with_graph,
        **speed,
    }
    if distance is not None:
        values["distance"], values["distance_name"] = distance
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }


class TrainingLog:
    """`metrics.jsonl` and `events.jsonl`; TensorBoard and Weights & Biases where the recipe asks for them.

    Opening it removes lines after the checkpoint that is resumed from. Raises UserError where the disk does not take a
    line, or where wandb is asked for and not installed.
    """

    def __init__(self, recipe: Recipe, samples_seen: int, identity: dict[str, Any]) -> None:
        folder = RunFolder(recipe.folder)
        self.metrics, self.events = folder.log, folder.events
        for path in (self.metrics, self.events):
            _remove_lines_after(path, samples_seen)
        self.tensorboard = self.wandb = None
        if recipe.train.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(folder.tensorboard), purge_step=samples_seen + 1)
        if recipe.train.log.wandb_project:
            self.wandb = _start_wandb(recipe, identity)

    def write(self, values: Values) -> None:
        """One line, of the training samples seen until `values["samples"]`."""
        samples = values["samples"]
        numbers = {f"train/{name}": value for name, value in values.items() if isinstance(value, int | float)}
        with disk_errors_as_user_errors(self.metrics):
            append_line(self.metrics, values)
            if self.tensorboard is not None:
                for name, value in numbers.items():
                    self.tensorboard.add_scalar(name, value, samples)
                self.tensorboard.flush()
            if self.wandb is not None:
                self.wandb.log(numbers, step=samples)

    def sync(self) -> None:
        """Puts the lines on disk."""
        with disk_errors_as_user_errors(self.metrics):
            for path in (self.metrics, self.events):
                if path.exists():
                    sync(path)

    def event(self, values: dict[str, Any]) -> None:
        """Something out of the ordinary, written and printed."""
        with disk_errors_as_user_errors(self.events):
            append_line(self.events, values)
        tqdm.write(f"train: {json.dumps(values)}", file=sys.stderr)

    def image(self, path: Path, samples: int) -> None:
        """A grid of samples, an image file at `path`."""
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
    """Starts or resumes a run. Requeued jobs share it: its id is a function of the run's folder and identity."""
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


def _remove_lines_after(path: Path, samples_seen: int) -> None:
    """Removes the lines of steps that will be done again, and damaged lines with a warning."""
    if not path.exists():
        return
    lines = [line for line in read_log(path) if line["samples"] <= samples_seen]
    with atomic_write(path) as file:
        file.write_text("".join(map(log_line, lines)))


class ProgressBar:
    """A bar on a terminal; a line every ten seconds in a log file; nothing on ranks other than 0.

    After some steps it warns where the log's next line is far away: until then nothing is shown.
    """

    def __init__(
        self, total: int, samples_seen: int, rank: int, seconds: float = math.inf, every_samples: int = 0
    ) -> None:
        """`total`, `seconds`: of the whole training, which ends with the first of both. `every_samples`: the log's
        interval; 0: nothing is said of it.
        """
        self.steps, self.counted, self.started = 0, 0, 0.0
        self.every_samples = min(every_samples, total - samples_seen) if rank == 0 else 0
        on_terminal = sys.stderr.isatty()
        self.lines = rank == 0 and not on_terminal
        self.total, self.seconds, self.last_line = total, seconds, 0.0
        self.bar = tqdm(
            total=total,
            initial=samples_seen,
            unit="sample",
            desc="train",
            disable=rank != 0 or not on_terminal,
            smoothing=0.05,
        )

    def advance(self, samples: int) -> None:
        self.bar.update(samples)
        self.steps += 1
        if self.steps == 1:  # the first step allocates
            self.started = time.monotonic()
        elif self.steps <= TIMED_STEPS + 1:
            self.counted += samples
        if self.steps == TIMED_STEPS + 1 and (
            warning := long_silence(self.every_samples, self.counted / (time.monotonic() - self.started))
        ):
            tqdm.write(warning, file=sys.stderr)

    def show(self, state: TrainState, speed: dict[str, float | None]) -> None:
        """The mean loss since the last log line; `speed`: `Throughput.read`."""
        loss, samples, rate = state.interval.means()["loss"], state.samples_seen, speed["samples_per_second"]
        if loss is None:
            return
        self.bar.set_postfix(loss=f"{loss:.4f}")
        ends = samples == self.total or state.seconds >= self.seconds
        due = time.monotonic() - self.last_line > LINE_EVERY_SECONDS or ends
        if self.lines and due:
            seconds = min((self.total - samples) / rate, max(0.0, self.seconds - state.seconds)) if rate else None
            left = "" if seconds is None else f", {tqdm.format_interval(seconds)} left"
            print(
                f"train: {samples:,} of {self.total:,} samples, loss {loss:.4f}, {rate:.1f} samples/s{left}", flush=True
            )
            self.last_line = time.monotonic()

    def close(self) -> None:
        self.bar.close()
