"""Jobs on a real SLURM that has no sacct: what fails is told, what is interrupted comes back, what is asked arrives."""

import contextlib
import os
import pty
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import submitit

from common.jobs import Job, failed
from common.recipe import Recipe
from pipeline.orchestration.code_snapshot import take_snapshot
from slurm.cluster import Resources, executor, run, run_array, submit
from tests.integration.conftest import ROOT, environment
from tests.slurm_cluster.configuration import Cluster
from tests.slurm_cluster.fixtures import squeue, state, wait_until

WORK = "tests.slurm_cluster.work"
FOUR = Resources(nodes=2, processes=2, timeout_minutes=5)
HOSTILE = """it's a "run"; $(touch pwned) `touch pwned` & #x"""


def job(function: str, **arguments: Any) -> Job:
    return Job.of(WORK, function, Recipe(name="none"), **arguments)


def made(folder: Path, resources: Resources = Resources(timeout_minutes=5), **more: Any) -> submitit.AutoExecutor:  # noqa: B008
    return executor("slurm", folder / "logs", "test", resources, **more)


def test_a_failing_rank_ends_its_job_within_seconds_and_is_the_one_told(slurm: Cluster, tmp_path: Path) -> None:
    (tmp_path / "started").mkdir()
    began = time.monotonic()
    with pytest.raises(submitit.core.utils.FailedJobError, match="LookupError: the cause, on rank 3"):
        run(made(tmp_path, FOUR), job("fail_on_rank", rank=3, started=str(tmp_path / "started")), failed=failed)
    assert time.monotonic() - began < 100  # the others would have slept for 600 s


def test_a_job_that_fails_at_import_shows_the_import(slurm: Cluster, tmp_path: Path) -> None:
    missing = Job("tests.slurm_cluster.no_such_module", "work", job("mistake").recipe)
    with pytest.raises(
        submitit.core.utils.FailedJobError, match=r"No module named 'tests\.slurm_cluster\.no_such_module'"
    ):
        run(made(tmp_path), missing, failed=failed)


def test_a_process_that_ends_without_a_word_is_told_with_its_log(slurm: Cluster, tmp_path: Path) -> None:
    with pytest.raises(submitit.core.utils.FailedJobError, match=r"FAILED\) without a result(.|\n)*last words"):
        run(made(tmp_path), job("end_the_process"), failed=failed)


def test_a_users_mistake_is_one_line_and_stops_the_jobs_after_it(slurm: Cluster, tmp_path: Path) -> None:
    first = submit(made(tmp_path), [job("mistake")])[0]
    second = submit(made(tmp_path, after=first.job_id), [job("wait", seconds=600)])[0]
    wait_until(lambda: state(second.job_id) == "CANCELLED", "the second job to be cancelled")
    assert state(first.job_id) == "FAILED"
    assert first.stderr().splitlines()[0] == "error: data.images: nothing here; choose another folder"
    assert first.result() == {"error": "data.images: nothing here; choose another folder"}


def test_an_interrupted_job_is_queued_again_and_all_its_ranks_start_again(slurm: Cluster, tmp_path: Path) -> None:
    (tmp_path / "starts").mkdir()
    outcomes = run(made(tmp_path, FOUR), job("interrupted_once", folder=str(tmp_path / "starts")), failed=failed)
    assert len(outcomes) == 4
    starts = {path.name for path in (tmp_path / "starts").iterdir()}
    assert starts == {f"{rank}-start-{restart}" for rank in range(4) for restart in range(2)}


def test_arrays_give_all_results_with_so_many_at_once(slurm: Cluster, tmp_path: Path) -> None:
    calls = [job("note", path=str(tmp_path / f"note-{part}")) for part in range(3)]
    outcomes = run_array(made(tmp_path), calls, at_once=2, failed=failed)
    assert [set(outcome) for outcome in outcomes] == [{"seconds"}] * 3
    assert len(list(tmp_path.glob("note-*"))) == 3
    (script,) = {path.resolve() for path in (tmp_path / "logs").glob("*_submission.sh")}
    assert "#SBATCH --array=0-2%2" in script.read_text()


@pytest.mark.parametrize(("gpus", "seen"), [(1, "0,1"), (0, "none")])
def test_a_rank_sees_the_gpus_of_its_job_on_its_node(slurm: Cluster, tmp_path: Path, gpus: int, seen: str) -> None:
    (tmp_path / "seen").mkdir()
    asked = Resources(nodes=2, processes=2, gpus_per_process=gpus, timeout_minutes=5)
    run(made(tmp_path, asked), job("gpus", folder=str(tmp_path / "seen")), failed=failed)
    assert {path.name: path.read_text() for path in (tmp_path / "seen").iterdir()} == dict.fromkeys("0123", seen)


@pytest.mark.parametrize(
    ("option", "seen"),
    [("gres: 'gpu:a100:4'", "0,1,2,3"), ("gpus-per-node: 'a100:3'", "0,1,2"), ("gpus: 5", "0,1,2,3,4")],
)
def test_gpus_that_the_site_asks_for_take_the_place_of_the_recipes(
    option: str, seen: str, slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "seen").mkdir()
    (tmp_path / "site.yaml").write_text(f"sbatch: {{{option}}}")
    monkeypatch.setenv("FPDM_SITE", str(tmp_path / "site.yaml"))
    asked = Resources(processes=2, gpus_per_process=1, timeout_minutes=5)
    run(made(tmp_path, asked), job("gpus", folder=str(tmp_path / "seen")), failed=failed)
    assert {path.name: path.read_text() for path in (tmp_path / "seen").iterdir()} == dict.fromkeys("01", seen)


@pytest.mark.parametrize(
    ("option", "said"), [("no-such-option: 1", "unrecognized"), ("ntasks-per-gpu: 1", "exclusive")]
)
def test_an_option_that_sbatch_does_not_take_is_told_in_its_words(
    option: str, said: str, slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site.yaml").write_text(f"sbatch: {{{option}}}")
    monkeypatch.setenv("FPDM_SITE", str(tmp_path / "site.yaml"))
    with pytest.raises(ValueError, match=f"SLURM refuses the job: .*{said}") as raised:
        submit(made(tmp_path), [job("mistake")])
    assert "\n" not in str(raised.value)


def test_the_shell_of_an_interactive_step_is_one_process_and_what_it_launches_are_ranks(
    slurm: Cluster, tmp_path: Path
) -> None:
    told = "from common.ranks import rank_and_world_size; print('told', *rank_and_world_size(), flush=True)"
    python = shlex.join([sys.executable, "-c", told])
    inside = f"cd {ROOT}; {python}; nohup {python} </dev/null 2>&1 | cat; srun --overlap --ntasks=3 {python}"
    terminal, other_end = pty.openpty()
    step = subprocess.Popen(
        ["srun", "--ntasks=3", "--pty", "bash", "-c", inside],
        stdin=other_end, stdout=other_end, stderr=other_end, start_new_session=True,
    )  # fmt: skip
    os.close(other_end)
    output = b""
    with contextlib.suppress(OSError):  # the end, as Linux tells it
        while read := os.read(terminal, 4096):
            output += read
    assert step.wait(60) == 0
    assert sorted(re.findall(r"told (\d \d)", output.decode())) == ["0 1", "0 1", "0 3", "1 3", "2 3"]
    assert output.count(b"note: one process, in an interactive shell of a step of 3 tasks") == 2


def test_a_full_queue_is_waited_in(slurm: Cluster, tmp_path: Path) -> None:
    asked = ["sbatch", "--parsable", "--exclusive", "--nodes=2", "--output=/dev/null", "--wrap=sleep 600"]
    other = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    wait_until(lambda: state(other) == "RUNNING", "another's job to fill the cluster")
    waiting = submit(made(tmp_path), [job("note", path=str(tmp_path / "note"))])[0]
    wait_until(lambda: squeue("%r", f"--jobs={waiting.job_id}") in (["Resources"], ["Priority"]), "the job to wait")
    subprocess.run(["scancel", other], check=True)
    wait_until(lambda: state(waiting.job_id) == "COMPLETED", "the job to have its turn")


def test_paths_reach_no_shell_unquoted(slurm: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / HOSTILE
    folder.mkdir()
    assert not failed(run(made(folder), job("note", path=str(folder / "note")), failed=failed)[0])
    assert (folder / "note").exists()
    assert list(folder.glob("logs/*_0_result.pkl"))
    assert list(folder.glob("logs/*_0_log.out"))
    assert not list(tmp_path.rglob("pwned"))
    assert not (ROOT / "pwned").exists()


@pytest.mark.parametrize("bad", ["100%j", "back\\slash", "two\nlines"])
def test_a_path_that_slurm_would_change_is_refused(slurm: Cluster, tmp_path: Path, bad: str) -> None:
    with pytest.raises(ValueError, match="SLURM cannot write logs to a path with"):
        made(tmp_path / bad)


def test_the_site_file_reaches_every_job(slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site.yaml"
    site.write_text(
        "partition: high\nmemory_gb: 4\nsetup: ['export DISK=disk']\nsbatch: {nice: 5}\n"
        f"scratch: '{tmp_path}/a b/$DISK/$SLURM_JOB_ID'\n"
    )
    monkeypatch.setenv("FPDM_SITE", str(site))
    asked = Resources(timeout_minutes=5, share_of_node=0.25)
    submitted = submit(made(tmp_path, asked), [job("note", path=str(tmp_path / "note"))])[0]
    assert squeue("%P|%y|%m", "--states=all", f"--jobs={submitted.job_id}") == ["high|5|1G"]
    wait_until((tmp_path / "note").exists, "the job")
    wait_until(lambda: state(submitted.job_id) == "COMPLETED", "its end")
    scratch = tmp_path / "a b/disk" / submitted.job_id
    assert (tmp_path / "note").read_text().splitlines()[2] == str(scratch)
    assert scratch.is_dir()


def test_a_wrong_partition_is_told_with_the_file_to_correct(
    slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("partition: nowhere\n")
    monkeypatch.setenv("FPDM_SITE", str(site))
    with pytest.raises(ValueError, match=r"invalid partition specified: nowhere.*site\.yaml"):
        submit(made(tmp_path), [job("mistake")])


def test_a_job_runs_the_code_as_it_was_when_it_was_submitted(
    slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the snapshot comes before it, and has no tests
    code = take_snapshot(tmp_path / HOSTILE / "code")
    assert take_snapshot(tmp_path / HOSTILE / "code") == code
    run(made(tmp_path, code=code), job("note", path=str(tmp_path / "note")), failed=failed)
    assert (tmp_path / "note").read_text().splitlines()[0] == str(code / "common/jobs.py")


def test_a_job_submitted_from_a_job_does_not_inherit_it(slurm: Cluster, tmp_path: Path) -> None:
    submits = (
        "from tests.integration.test_slurm_jobs import *\n"
        f"submit(made(Path({str(tmp_path)!r})), [job('note', path={str(tmp_path / 'note')!r})])\n"
    )
    (tmp_path / "submits.py").write_text(submits)
    # 1 MB a CPU: the inner job would be killed, or refused, with it.
    subprocess.run(
        [*("sbatch", "--mem-per-cpu=1", "--ntasks=2", "--nodes=2", f"--output={tmp_path}/outer"), "--wrap",
         shlex.join([sys.executable, f"{tmp_path}/submits.py"])],
        check=True,
        cwd=ROOT,
        env=environment() | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    wait_until((tmp_path / "note").exists, (tmp_path / "outer").read_text() if (tmp_path / "outer").exists() else "it")
