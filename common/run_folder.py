"""Where things lie in a run folder, `runs/<name>/`, and in the folders of its sample sets. The one home of these names.

This module defines paths only. File formats are defined where the files are written, and the names of chunk files in
`pipeline/sampling/chunks.py`.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from common.recipe import Recipe


class _Place:
    """A path below the folder whose attribute it is."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, folder: "RunFolder | SampleFolder", _owner: type) -> Path:
        return folder.path / self.name


@dataclass(frozen=True)
class RunFolder:
    """`runs/<name>/`."""

    path: Path

    recipe = _Place("recipe.yaml")  # resolved, as training wrote it
    provenance = _Place("provenance.jsonl")  # a line each time that training began
    deepspeed = _Place("deepspeed.json")
    log = _Place("metrics.jsonl")  # of training
    events = _Place("events.jsonl")
    diverged = _Place("diverged.json")  # why the training of a reproduction ended: its page goes on without it
    tensorboard = _Place("tensorboard")
    checkpoints = _Place("checkpoints")
    weights = _Place("weights")
    grids = _Place("grids")
    samples = _Place("samples")
    measurements = _Place("eval")
    statistics = _Place("eval/statistics")
    metrics = _Place("metrics.json")  # of evaluation
    sweep_table = _Place("sweep/table.json")
    sweep_csv = _Place("sweep/table.csv")
    sweep_markdown = _Place("sweep/table.md")
    sweep_plot = _Place("sweep/distances.png")
    contact_sheet = _Place("samples.png")
    report = _Place("report.html")
    pipeline = _Place("pipeline")  # as diffusers loads it
    times = _Place("stages.json")
    jobs = _Place("jobs.json")
    logs = _Place("logs")
    code = _Place("code")  # <key>/, for jobs that start later

    @property
    def references(self) -> Path:
        """Statistics that all runs share."""
        return self.path.parent / ".references"

    def checkpoint(self, samples_seen: int) -> Path:
        return self.checkpoints / _counted_name(samples_seen)

    def weights_after(self, samples_seen: int, ema: str) -> Path:
        """The weights of one average, as `power-0.05`, in diffusers' layout."""
        return self.weights / _counted_name(samples_seen) / ema

    def grid(self, samples_seen: int) -> Path:
        return self.grids / f"{_counted_name(samples_seen)}.png"

    def step_logs(self, step: str) -> Path:
        """The logs and results of the jobs of one step, as submitit writes them."""
        return self.logs / step

    def sample_set(self, samples_seen: int, key: str) -> Path:
        """`key`: of all settings that change an image."""
        return self.samples / f"{_counted_name(samples_seen)}-{key}"


@dataclass(frozen=True)
class SampleFolder:
    """One set of samples, `samples/<samples seen>-<key>/`; its chunks lie in it too."""

    path: Path

    settings = _Place("settings.json")  # what the key is of
    plan = _Place("plan.json")  # iterations and reuse of each step
    unsound = _Place("unsound.json")  # why these samples are non-finite or constant: a sweep goes on without them
    iterates = _Place("iterates.npz")  # a few images after more and fewer iterations and steps, for the report

    def features(self, key: str) -> Path:
        return self.path / f"features-{key}"

    def adm_file(self, count: int) -> Path:
        """The first samples in one file: arr_0 (N, H, W, 3) uint8 and arr_1 (N,) labels, as ADM's evaluator reads."""
        return self.path / f"samples-{count}.npz"

    def pngs(self, count: int) -> Path:
        """The first samples as <index>.png."""
        return self.path / f"images-{count}"


def _counted_name(samples_seen: int) -> str:
    return f"{samples_seen:012d}"


def counted(folder: Path) -> list[Path]:
    """The folders in it that are named by a number of samples as this project writes it, in order.

    Not `000000000160.bak`, which is somebody's copy.
    """
    paths = folder.iterdir() if folder.is_dir() else ()
    named = [path for path in paths if re.fullmatch(r"[0-9]{12}|[1-9][0-9]{12,}", path.name) and path.is_dir()]
    return sorted(named, key=lambda path: int(path.name))


def weights_folder(recipe: Recipe, samples_seen: int, ema: str | None = None) -> Path:
    """Holds averaged weights after `samples_seen` training samples, in diffusers' layout; `ema`: the run's first."""
    return RunFolder(recipe.folder).weights_after(samples_seen, ema or recipe.train.ema.names[0])
