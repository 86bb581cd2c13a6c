"""What a run says while it works, and how much time is left of it."""

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from common.errors import UserError
from common.loading import dump_recipe, parse_recipe
from common.log_lines import read_log
from common.recipe import Recipe
from common.run_folder import RunFolder
from common.stage import Stage
from pipeline.planning.estimate import Speeds, count_images, measured, resolved, stage_times
from pipeline.planning.page import TRAINING_SECONDS, duration
from pipeline.training.identity import total_samples
from pipeline.training.operations import training_flops, with_end
from preprocess.from_data import from_data
from slurm.cluster import Resources, executor, run

LINE_SECONDS = 60.0  # between lines of a stage where output is no terminal
READ_SECONDS = 10.0  # between looks at a training's log
# Operations of a training from which measuring the machine, for half a minute, is little beside it: on a core and on a
# GPU, of which small networks use a hundredth.
LONG = {"core": 4e12, "gpu": 1e15}


@contextmanager
def status_line(title: str, left: "TimeLeft") -> Iterator[Callable[[str], None]]:
    """Gives a function that shows a line of a job's output in place of the one before; where output is no terminal, a
    line a minute stays. Warnings stay in both.
    """
    terminal, said = sys.stdout.isatty(), time.monotonic()
    clear = "\r\x1b[K" if terminal else ""

    def show(line: str) -> None:
        nonlocal said
        text = f"{title}{left.now()}: {line.removeprefix(f'{left.current}: ')}"
        if line.startswith("warning:"):
            print(clear, end="", flush=True)
            print(line, file=sys.stderr, flush=True)
        elif terminal:
            print(f"{clear}{text[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
        elif time.monotonic() - said > LINE_SECONDS:
            said = time.monotonic()
            print(text, flush=True)

    try:
        show("starting")
        yield show
    finally:
        print(clear, end="", flush=True)


class TimeLeft:
    """Of a whole run on this machine: what its plan says of stages that have not begun, and the training's own speed.
    Where a stage's time is not known, or has passed, nothing is said.
    """

    def __init__(self, recipe: Recipe, stages: Sequence[Stage], cluster: str) -> None:
        """`stages`: from the first that is still to do. Measures the machine where the training is long."""
        self.recipe = recipe
        self.names = [stage.name for stage in stages]
        self.expected = expected_seconds(recipe, stages) if cluster == "local" else {}
        self.current, self.begun, self.read = "", time.monotonic(), float("-inf")
        self.training: float | None = None

    def begin(self, stage: str) -> None:
        self.current, self.begun = stage, time.monotonic()

    def after(self) -> str:
        """At the end of the current stage."""
        return f"; about {duration(later)} left" if (later := self._later()) else ""

    def now(self) -> str:
        later, own = self._later(), self._own()
        return "" if later is None or own is None else f" (about {duration(own + later)} left)"

    def _later(self) -> float | None:
        names = self.names[self.names.index(self.current) + 1 :]
        return sum(self.expected[name] for name in names) if set(names) <= set(self.expected) else None

    def _own(self) -> float | None:
        """Of the current stage."""
        if self.current == "train":
            if time.monotonic() - self.read > READ_SECONDS:
                self.training, self.read = training_left(self.recipe, time.monotonic() - self.begun), time.monotonic()
            return self.training
        left = self.expected.get(self.current, 0.0) - (time.monotonic() - self.begun)
        return left if left > 0 else None


def training_left(recipe: Recipe, seconds: float) -> float | None:
    """Seconds, by the speed of its last log line; None where none was written in the last `seconds`."""
    log = RunFolder(recipe.folder).log
    if recipe.train.max_hours or not log.exists() or time.time() - log.stat().st_mtime > seconds:
        return None
    lines = read_log(log)
    if not lines:  # of a training that was killed before its first checkpoint, and has begun again
        return None
    last, rate = lines[-1], lines[-1].get("samples_per_second")
    return (total_samples(with_end(from_data(recipe)).train) - last["samples"]) / rate if rate else None


def expected_seconds(recipe: Recipe, stages: Sequence[Stage]) -> dict[str, float]:
    """Of these stages, all of them still to do, by this machine's speeds, which a job measures. Empty where that is not
    worth its time, or not possible.
    """
    images = count_images(recipe)
    try:
        recipe = with_end(resolved(recipe, images))
    except UserError:  # no images yet
        images = None
    launch = recipe.launch
    long = LONG["gpu"] if launch.gpus_per_process else LONG["core"] * launch.cpus_per_process
    names = tuple(stage.name for stage in stages)
    if images is None or "train" not in names or training_flops(recipe) < long * launch.processes:
        return {}
    speeds = _measured_in_a_job(recipe, names)
    times = stage_times(recipe, images, speeds, stages, "local")
    return {name: time.seconds for name, time in times.items() if time.seconds is not None}


def _measured_in_a_job(recipe: Recipe, names: tuple[str, ...]) -> Speeds:
    """So that memory and GPUs are free afterwards."""
    launch, logs = recipe.launch, RunFolder(recipe.folder).step_logs("plan")
    resources = Resources(
        processes=1,
        cpus_per_process=launch.processes * launch.cpus_per_process,
        gpus_per_process=launch.processes * launch.gpus_per_process,
    )
    print("measuring this machine for half a minute, to say how long the run takes", flush=True)
    queue = executor("local", logs, f"{recipe.name}-plan", resources)
    (speeds,) = run(queue, speeds_of, dump_recipe(recipe), names, failed=lambda _: False, show=lambda _: None)
    return speeds


def speeds_of(recipe: str, names: tuple[str, ...]) -> Speeds:
    """Of this machine; none where the trial fails, which the run will explain."""
    try:
        return measured(parse_recipe(recipe), names, TRAINING_SECONDS)
    except UserError as fault:
        print(f"not measured: {fault}", flush=True)
        return Speeds()
