"""Ranks go on when one of them, or a node's supervisor, is killed; what a rank says of its end is told by all."""

import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from common.errors import INTERRUPTED
from tests.integration.ranks import Ranks, started
from tests.integration.shared_work import supervise


def supervisors(
    function: str, folder: Path, nodes: int = 2, node_counts: tuple[int, ...] = (2, 1)
) -> AbstractContextManager[Ranks]:
    """Those of so many nodes, of one rank each."""
    return started(folder, supervise, function, str(folder), 1, node_counts, ranks=nodes)


def wait_until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 90
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def begun(folder: Path, rank: int, world_size: int) -> list[int]:
    """Processes that were this rank, one after another."""
    path = folder / f"{rank}-of-{world_size}"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists() and ") Z " not in Path(f"/proc/{pid}/stat").read_text()


def test_without_a_killed_supervisor_as_many_nodes_go_on_as_may_share_the_work(tmp_path: Path) -> None:
    with supervisors("until_told", tmp_path, nodes=3, node_counts=(3, 1)) as nodes:
        wait_until(lambda: all(begun(tmp_path, rank, 3) for rank in range(3)))
        nodes.send(2, signal.SIGKILL)
        wait_until(lambda: begun(tmp_path, 0, 1))
        assert not any(is_alive(pid) for rank in range(3) for pid in begun(tmp_path, rank, 3))
        (tmp_path / "go").touch()
        assert nodes.wait()[:2] == [0, 0]
        assert not begun(tmp_path, 1, 2)  # the second node was a spare
    assert "2 of 3 nodes are left; on 1 of them the work goes on" in nodes.output


def test_a_node_that_falls_silent_is_lost_too(tmp_path: Path) -> None:
    """Its connections stay open, as those of a machine without power."""
    with supervisors("until_told", tmp_path) as nodes:
        wait_until(lambda: begun(tmp_path, 0, 2) and begun(tmp_path, 1, 2))
        nodes.send(1, signal.SIGSTOP)
        wait_until(lambda: begun(tmp_path, 0, 1))
        (tmp_path / "go").touch()
        nodes.processes[0].join(30)
        assert nodes.processes[0].exitcode == 0


def test_without_the_first_node_the_others_end_to_be_queued_again(tmp_path: Path) -> None:
    with supervisors("until_told", tmp_path) as nodes:
        wait_until(lambda: begun(tmp_path, 0, 2) and begun(tmp_path, 1, 2))
        nodes.send(0, signal.SIGKILL)
        assert nodes.wait(30) == [-signal.SIGKILL, INTERRUPTED]
        wait_until(lambda: not any(is_alive(pid) for rank in range(2) for pid in begun(tmp_path, rank, 2)))
    assert nodes.errors == ["interrupted: the first node is gone: queued again, from the last checkpoint"]


def test_a_signal_stops_a_rank_even_before_it_handles_any(tmp_path: Path) -> None:
    with supervisors("until_told_or_stopped", tmp_path, nodes=1) as nodes:
        pid = nodes.processes[0].pid
        wait_until(lambda: Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        nodes.send(0, signal.SIGUSR2)
        assert nodes.wait() == [INTERRUPTED]
    assert nodes.errors == ["interrupted: work: SIGTERM"]


@pytest.mark.parametrize(
    ("function", "nodes", "status", "message"),
    [
        ("mistake_of_rank_1", 2, 2, "error: data.images: nothing here"),
        ("fault_of_rank_1", 2, 1, "LookupError: the cause"),
        ("death_of_rank_1", 2, 1, "RuntimeError: ranks died 2 times without a word, on nodes that are all there"),
    ],
)
def test_what_a_rank_says_of_its_end_is_told_by_all_and_one_that_says_nothing_starts_again(
    function: str, nodes: int, status: int, message: str, tmp_path: Path
) -> None:
    with supervisors(function, tmp_path, nodes) as running:
        assert running.wait() == [status] * nodes
    assert all(message in log.read_text() for log in running.logs)
    if function == "death_of_rank_1":
        assert [len(begun(tmp_path, rank, 2)) for rank in range(2)] == [2, 2]
