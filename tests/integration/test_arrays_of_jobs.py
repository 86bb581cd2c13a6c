"""Arrays of jobs: all results in order, a limit on how many run at once, and the first failure told."""

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import submitit

from slurm.cluster import Resources, executor, run, run_array


def is_even(number: int, seconds: float = 0.0) -> dict[str, Any]:
    time.sleep(seconds)
    if number == 13:
        raise LookupError(f"thirteen in process {os.environ.get('SUBMITIT_LOCAL_GLOBALID')}")
    return {"number": number} if number % 2 == 0 else {"error": f"{number} is odd"}


def counted(folder: Path, number: int) -> int:
    """How many ran at once, counted by files."""
    mine = folder / f"{number}"
    mine.touch()
    time.sleep(0.5)
    running = len(list(folder.iterdir()))
    mine.unlink()
    return running


def failed(result: Any) -> bool:
    return isinstance(result, dict) and "error" in result


@pytest.mark.parametrize("cluster", ["local", "debug"])
def test_results_come_in_the_order_of_the_calls(cluster: str, tmp_path: Path) -> None:
    made = executor(cluster, tmp_path, "numbers", Resources())
    calls = [partial(is_even, number, seconds) for number, seconds in ((4, 1.0), (2, 0.0), (8, 0.0))]
    assert run_array(made, calls, at_once=2, failed=failed) == [{"number": 4}, {"number": 2}, {"number": 8}]


def test_no_more_jobs_run_at_once_than_asked_for(tmp_path: Path) -> None:
    (tmp_path / "running").mkdir()
    made = executor("local", tmp_path / "logs", "counted", Resources())
    calls = [partial(counted, tmp_path / "running", number) for number in range(4)]
    assert max(run_array(made, calls, at_once=2, failed=failed)) <= 2


@pytest.mark.parametrize("cluster", ["local", "debug"])
def test_a_told_failure_is_returned_alone_and_ends_the_rest(cluster: str, tmp_path: Path) -> None:
    started = time.monotonic()
    made = executor(cluster, tmp_path, "numbers", Resources())
    calls = [partial(is_even, 3), partial(is_even, 2, 0.0 if cluster == "debug" else 600.0)]
    assert run_array(made, calls, at_once=2, failed=failed) == [{"error": "3 is odd"}]
    assert time.monotonic() - started < 60


def test_the_first_exception_is_raised_with_its_traceback(tmp_path: Path) -> None:
    made = executor("local", tmp_path, "numbers", Resources())
    calls = [partial(is_even, 2, 600.0), partial(is_even, 13), partial(is_even, 2, 600.0)]
    with pytest.raises(submitit.core.utils.FailedJobError, match=r"in is_even(.|\n)*LookupError: thirteen"):
        run_array(made, calls, at_once=3, failed=failed)


def fail_in_turn(folder: Path) -> None:
    """Rank 1 fails; rank 0 would wait for it, and then fail for that."""
    if os.environ["SUBMITIT_LOCAL_GLOBALID"] == "1":
        raise LookupError("the cause")
    while not any(folder.glob("*/*_1_result.pkl")):
        time.sleep(0.05)
    raise ConnectionError("the consequence")


def wait_in_vain() -> None:
    if os.environ["SUBMITIT_LOCAL_GLOBALID"] == "1":
        raise LookupError("the cause")
    time.sleep(600)


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN], ids=["", "in a shell's background"])
def test_a_job_of_several_tasks_tells_the_failure_that_came_first(
    tmp_path: Path, handler: Any, request: pytest.FixtureRequest
) -> None:
    before = signal.signal(signal.SIGINT, handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    for function in (partial(fail_in_turn, tmp_path), wait_in_vain):
        made = executor("local", tmp_path / "logs", "tasks", Resources(processes=2))
        with pytest.raises(submitit.core.utils.FailedJobError, match="the cause"):
            run(made, function, failed=failed)
