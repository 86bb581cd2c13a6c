"""Processes forked from one server that has imported everything: starting Python and its libraries costs seconds, a
fork nothing. What runs in them is the command itself.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
PRELOADED = [
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # which every engine with ZeRO imports, and all of inductor with it
    "torch.utils.tensorboard",
    "torch.utils.flop_counter",
    "diffusers.models.autoencoders",
    "timm",
    "matplotlib.pyplot",
    "pipeline.train",
    "pipeline.training.run",
    "tests.integration.faults",
    "tests.integration.first_calls",
]

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(PRELOADED)


def run_python(
    *arguments: str, environment: dict[str, str] | None = None, seconds: float = 240
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run(["python", *arguments], ...)` in the clone: a script or `-c PROGRAM`, and its arguments.

    environment: None for this process's own.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # the server's, and so that of all it forks
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("stdout", "stderr")]
        process = context.Process(target=_python, args=(arguments, dict(environment or os.environ), streams))
        process.start()
        try:
            process.join(seconds)
            written = [path.read_text() for path in streams]
            if process.exitcode is None:
                raise subprocess.TimeoutExpired(arguments, seconds, *written)
            return subprocess.CompletedProcess(arguments, process.exitcode, *written)
        finally:
            if process.is_alive():
                for member in psutil.Process(process.pid).children(recursive=True):
                    member.kill()
                process.kill()


def _python(arguments: tuple[str, ...], environment: dict[str, str], streams: list[Path]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # of the server's environment
    os.chdir(ROOT)
    for number, path in enumerate(streams, 1):
        with open(path, "w") as sink:
            os.dup2(sink.fileno(), number)
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(arguments[1], {"__name__": "__main__"})
    else:
        sys.argv = list(arguments)
        runpy.run_path(arguments[0], run_name="__main__")
