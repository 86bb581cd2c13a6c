"""What the tests have jobs do: stages that fail, wait, or take their time. Each is `function(recipe, **arguments)`."""

import os
import sys
import time
from pathlib import Path
from typing import Any

from common.errors import Interrupted, UserError
from common.recipe import Recipe


def note(recipe: Recipe, *, path: str) -> None:
    """Which code runs, on which node, with what for a scratch folder."""
    import common.jobs

    Path(path).write_text(f"{common.jobs.__file__}\n{os.uname().nodename}\n{os.environ.get('TMPDIR', '')}\n")


def gpus(recipe: Recipe, *, folder: str) -> None:
    """Which GPUs each rank sees."""
    Path(folder, os.environ["SLURM_PROCID"]).write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "none"))


def wait(recipe: Recipe, *, seconds: int) -> None:
    time.sleep(seconds)


def fail_on_rank(recipe: Recipe, *, rank: int, started: str) -> None:
    """One rank fails when all have started; the others would wait for it for ever."""
    own, ranks = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    Path(started, str(own)).touch()
    while len(list(Path(started).iterdir())) < ranks:
        time.sleep(0.1)
    if own == rank:
        raise LookupError(f"the cause, on rank {rank}")
    time.sleep(600)


def mistake(recipe: Recipe) -> None:
    raise UserError("data.images: nothing here; choose another folder")


def interrupted_once(recipe: Recipe, *, folder: str) -> None:
    """As a training that is asked to stop: every rank leaves, and all are to start again."""
    rank = os.environ["SLURM_PROCID"]
    Path(folder, f"{rank}-start-{os.environ.get('SLURM_RESTART_COUNT', '0')}").touch()
    if "SLURM_RESTART_COUNT" not in os.environ:
        raise Interrupted("saved, asked to stop; run again to go on")


def end_the_process(recipe: Recipe) -> None:
    print("last words", file=sys.stderr, flush=True)
    os._exit(3)


def train_slowly(recipe: Recipe, *, step_seconds: float, slow_starts: int) -> None:
    """The real training, with steps that take their time in its first starts, so that there is time to interrupt it."""
    from fpdm.diffusion import Diffusion
    from pipeline.training.run import train

    loss = Diffusion.loss

    def slow(*arguments: Any, **named: Any) -> Any:
        time.sleep(step_seconds)
        return loss(*arguments, **named)

    if int(os.environ.get("SLURM_RESTART_COUNT", "0")) < slow_starts:
        Diffusion.loss = slow  # type: ignore[method-assign]
    train(recipe)
