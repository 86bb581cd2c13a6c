"""Ranks begin together; one that waits for others in vain says for whom, hears signals, and ends."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from common import ranks, rendezvous
from common.command import exit_status_of
from common.errors import UserError
from pipeline.stages import STAGES
from slurm.cluster import free_port

ROOT = Path(__file__).parents[3]
SHELL = {  # of `srun --ntasks=8 --pty bash`
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "node1",
}

forking = multiprocessing.get_context("fork")


def start(
    rank: int, ranks: int, port: int, log: Path, before: Callable[[], None] = lambda: None, host: str = "127.0.0.1"
) -> multiprocessing.Process:
    def work() -> None:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR=host, MASTER_PORT=str(port))
        os.environ.pop("TORCHELASTIC_RUN_ID", None)
        with open(log, "a") as sink:
            os.dup2(sink.fileno(), 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        before()
        sys.exit(exit_status_of(rendezvous.rendezvous))

    log.touch()
    process = forking.Process(target=work, daemon=True)
    process.start()
    return process


def ended(processes: list[multiprocessing.Process]) -> list[int | None]:
    for process in processes:
        process.join(60)
    statuses = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return statuses


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", socket.gethostname()])
def test_ranks_that_all_come_go_on_together_in_any_order(host: str, tmp_path: Path) -> None:
    port = free_port()
    first = [start(rank, 5, port, tmp_path / "log", host=host) for rank in (3, 1, 0, 4)]
    time.sleep(0.5)
    assert all(process.is_alive() for process in first)
    assert ended([*first, start(2, 5, port, tmp_path / "log", host=host)]) == [0] * 5
    assert (tmp_path / "log").read_text() == ""
    with socket.create_server(("127.0.0.1", port)):  # training meets there next
        pass


def test_other_connections_are_no_ranks(tmp_path: Path) -> None:
    port = free_port()
    first = start(0, 2, port, tmp_path / "log")
    patience = time.monotonic() + 30
    for word in (b"GET / HTTP/1.0\r\n\r\n", b"1 3\n", b"7 2\n", b"\xff\xfe", b""):  # another run's rank, and no rank
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=5) as other:
                    other.sendall(word)
                break
            except OSError:
                assert time.monotonic() < patience
                time.sleep(0.05)
    time.sleep(0.3)
    assert first.is_alive()
    assert ended([first, start(1, 2, port, tmp_path / "log")]) == [0, 0]


def impatient() -> None:
    rendezvous.REPORT_SECONDS, rendezvous.ALONE_SECONDS, rendezvous.LIMIT_SECONDS = 0.2, 0.8, 1.6


def impatient_with_others() -> None:
    rendezvous.REPORT_SECONDS, rendezvous.ALONE_SECONDS, rendezvous.LIMIT_SECONDS = 0.2, 60.0, 6.0


@pytest.mark.parametrize(
    ("here", "ranks", "expected"),
    [
        ([0], 8, "1 of 8 ranks have come to 127.0.0.1:{port}; missing: rank 1, 2, 3, 4, 5, 6, 7 after"),
        ([3], 8, "rank 3 of 8: rank 0 at 127.0.0.1:{port}, or another rank, is missing after"),
        ([0, 1, 3], 4, "3 of 4 ranks have come to 127.0.0.1:{port}; missing: rank 2 after"),
        ([0], 100, "missing: rank 1, 2, 3, 4, 5, 6, 7, 8, ... after"),
    ],
)
def test_ranks_that_do_not_come_are_named(here: list[int], ranks: int, expected: str, tmp_path: Path) -> None:
    port = free_port()
    logs = [tmp_path / f"log-{rank}" for rank in here]
    before = impatient if len(here) == 1 else impatient_with_others
    waiting = [start(rank, ranks, port, log, before) for rank, log in zip(here, logs, strict=True)]
    assert ended(waiting) == [2] * len(here)
    told, *_, last = logs[0].read_text().splitlines()
    assert told.startswith("waiting: ")
    assert last.startswith("error: ")
    assert expected.format(port=port) in last
    assert last.endswith("put RANK=0 WORLD_SIZE=1 before the command")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("deaf", [False, True])  # as a shell makes what it puts in the background
def test_a_rank_that_waits_hears_signals(number: signal.Signals, deaf: bool, tmp_path: Path) -> None:
    port = free_port()

    def before() -> None:
        signal.signal(number, signal.SIG_IGN if deaf else signal.SIG_DFL)
        rendezvous.REPORT_SECONDS = 0.0

    waiting = [start(rank, 3, port, tmp_path / f"log-{rank}", before) for rank in (0, 1)]
    patience = time.monotonic() + 30
    while not all("waiting: " in (tmp_path / f"log-{rank}").read_text() for rank in (0, 1)):
        assert time.monotonic() < patience
        time.sleep(0.05)
    for process in waiting:
        assert process.pid is not None
        os.kill(process.pid, number)
    assert ended(waiting) == [75, 75]
    last = (tmp_path / "log-0").read_text().splitlines()[-1]
    assert last.startswith(f"interrupted: {number.name} while ")
    assert last.endswith("nothing was done")


def test_a_port_in_use_is_reported(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert ended([start(0, 2, other.getsockname()[1], tmp_path / "log")]) == [2]
    assert "error: MASTER_PORT: rank 0 cannot listen at" in (tmp_path / "log").read_text()


def test_ranks_without_an_address_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"^MASTER_ADDR, MASTER_PORT: no host and port, but RANK=0 and WORLD_SIZE=2"):
        rendezvous.rendezvous()


ONE = """
import sys
from common import rendezvous
from common.command import run_stage_command
from common.stage import Stage, the_recipe

def work(recipe):
    print("worked")

stage = Stage(name="a", resolve=the_recipe, plan=lambda _: ["looked"], finished=bool, work=work, ranks_share=True)
rendezvous.ALONE_SECONDS, rendezvous.LEFT_OVER_SECONDS, rendezvous.LATER_SECONDS = 60.0, 0.3, 0.3
sys.exit(run_stage_command("", stage, sys.argv[1:]))
"""


def test_variables_that_may_be_left_over_are_told_within_half_a_minute() -> None:
    assert rendezvous.REPORT_SECONDS < rendezvous.LEFT_OVER_SECONDS < 30


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, True),  # without SLURM_TASK_PID, or with another's
        ({"SLURM_TASK_PID": "4194305"}, True),  # above all of Linux
        ({"SLURM_TASK_PID": str(os.getpid())}, False),  # srun python
        ({"SLURM_TASK_PID": str(os.getppid())}, False),  # srun bash -c python
        ({"SUBMITIT_EXECUTOR": "slurm"}, False),
        ({"RANK": "0", "WORLD_SIZE": "8"}, False),
    ],
)
def test_a_task_of_slurms_is_patient(more: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_TASK_PID", "SUBMITIT_EXECUTOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (SHELL | more).items():
        monkeypatch.setenv(name, value)
    assert ranks.may_be_left_over() is expected


def test_ranks_share_these_stages() -> None:
    assert [stage.name for stage in STAGES if stage.ranks_share] == ["encode", "train", "sample", "evaluate"]


def test_a_shells_variables_without_its_terminal_are_no_ranks() -> None:
    """As a notebook or a cron job has them: an eighth of the work is never taken for all of it."""

    outside = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}

    def run(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", ONE, "--config", "recipes/demo.yaml"],
            capture_output=True, text=True, cwd=ROOT, timeout=120, start_new_session=True,
            env={**outside, **SHELL, **more},
        )  # fmt: skip

    done = run()
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: 1 of 8 ranks have come to 127.0.0.1:" in done.stderr
    assert "SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=8 announced them" in done.stderr
    assert "unset SLURM_PROCID SLURM_STEP_NUM_TASKS, or put RANK=0" in done.stderr
    assert run(SLURM_PROCID="1").stdout == ""
    done = run(RANK="0", WORLD_SIZE="1")
    assert (done.returncode, done.stdout.splitlines()[:2]) == (0, ["plan: looked", "worked"])
