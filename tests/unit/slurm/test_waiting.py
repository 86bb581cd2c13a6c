"""What a job's tasks left is told, and what they could not leave."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import submitit

from slurm import waiting


@dataclass
class Ended:
    """A job of as many tasks as there are paths, which have ended."""

    results: list[Path]
    job_id: str = "1"

    @property
    def num_tasks(self) -> int:
        return len(self.results)

    @property
    def paths(self) -> SimpleNamespace:
        return SimpleNamespace(result_pickle=self.results[0], stderr=self.results[0].with_suffix(".err"))

    def task(self, rank: int) -> "Ended":
        return Ended(self.results[rank : rank + 1])


def test_lines_of_a_job_are_passed_on_whole_and_states_of_a_bar_are_lines() -> None:
    shown: list[str] = []
    lines = waiting.Lines(shown.append)
    for new in (b"warning: a fi", b"le is damaged\n\rencode:  0%", b"\rencode: 50%\r", b"encode: 99%"):
        lines(new)
    assert shown == ["warning: a file is damaged", "encode:  0%", "encode: 50%"]


def test_a_job_that_outlived_a_node_has_succeeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "UNSURE_SECONDS", 0)
    submitit.core.utils.cloudpickle_dump(("success", {"seconds": 1}), tmp_path / "0")
    job: Any = Ended([tmp_path / "0", tmp_path / "1"])
    assert waiting.outcomes(job, "COMPLETED", lambda _: False) == [{"seconds": 1}]
    with pytest.raises(submitit.core.utils.FailedJobError, match=r"job 1 ended \(FAILED\) without a result"):
        waiting.outcomes(job, "FAILED", lambda _: False)
