"""What ranks do in tests of supervisors: `function(recipe, folder=...)`. Each says in `folder` that it has begun."""

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import NoReturn

from common.command import exit_status_of
from common.errors import Interrupted, UserError
from common.recipe import Recipe
from pipeline.training.signals import stop_requests


def until_told(recipe: Recipe, *, folder: str) -> None:
    _begin(folder)
    _wait_for(Path(folder, "go"))


def until_told_or_stopped(recipe: Recipe, *, folder: str) -> None:
    time.sleep(0.5)  # a signal may come before there is a handler
    with stop_requests() as stop:
        _begin(folder)
        while not stop:
            time.sleep(0.02)
    raise Interrupted(f"{recipe.name}: {stop.signal}")


def mistake_of_rank_1(recipe: Recipe, *, folder: str) -> None:
    _begin(folder)
    if os.environ["RANK"] == "1":
        raise UserError("data.images: nothing here")
    _wait_for(Path(folder, "never"))


def fault_of_rank_1(recipe: Recipe, *, folder: str) -> None:
    """The other loses the connection, and may be heard first."""
    _begin(folder)
    if os.environ["RANK"] == "1":
        Path(folder, "cause").touch()
        raise LookupError("the cause")
    _wait_for(Path(folder, "cause"))
    raise RuntimeError("Connection closed by peer [127.0.0.1]:1")


def death_of_rank_1(recipe: Recipe, *, folder: str) -> None:
    _begin(folder)
    if os.environ["RANK"] == "1":
        others = Path(folder, "0-of-2")
        while not others.exists() or len(others.read_text().split()) < len(Path(folder, "1-of-2").read_text().split()):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)
    _wait_for(Path(folder, "never"))


def _begin(folder: str) -> None:
    rank, world_size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    with open(Path(folder, f"{rank}-of-{world_size}"), "a") as file:
        file.write(f"{os.getpid()}\n")


def _wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.02)


def supervise(function: str, folder: str, processes: int, node_counts: tuple[int, ...]) -> NoReturn:
    """A node's task, with times as short as tests need them."""
    from common import elastic

    elastic.SETTLE_SECONDS, elastic.SILENT_SECONDS, elastic.BEAT_SECONDS, elastic.MOST_DEATHS = 1.0, 3.0, 0.2, 1
    call = {"module": __name__, "function": function, "arguments": {"folder": folder}}
    work = partial(elastic.supervise, call=call, processes=processes, node_counts=node_counts)
    sys.exit(exit_status_of(lambda: work(Recipe(name="work"))))
