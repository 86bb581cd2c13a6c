# PYTHON_ARGCOMPLETE_OK
"""Shows the jobs of a run: states, last training step, loss, time left, and the end of the newest log.

python slurm/status.py runs/demo [--lines 5]
"""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from common.command import Parser, exit_status_of, path_argument
from common.errors import UserError, printable
from common.job_listing import JobForm, ListingForm
from common.log_lines import read_log
from common.recipe import wanted_samples
from common.run_folder import RunFolder
from common.run_recipe import read_recipe
from common.sealed import read_sealed

ROW = "{:14} {:>14} {:12} {:>8} {:>9}  {}"


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("run", type=path_argument, help="the run folder")
    parser.add_argument("--lines", type=int, default=5, help="how many lines of the newest log to show")
    arguments = parser.parse_args()
    return exit_status_of(lambda: print("\n".join(status(arguments.run, arguments.lines))))


def status(run: Path, lines: int) -> Iterator[str]:
    """The lines to print. Raises UserError where the folder has no jobs, or a damaged list of them."""
    listing = RunFolder(run).jobs
    if not listing.exists():
        raise UserError(f"{listing}: no such file; a run folder whose stages were submitted with --detach has one")
    jobs = read_sealed(listing, ListingForm, "squeue --me shows the queued jobs")["jobs"]
    yield ROW.format("step", "job", "state", "requeues", "elapsed", "why, or where")
    asked = [(listed, tasks_of(listed)) for listed in jobs]
    for listed, tasks in asked:
        for task in tasks or [{"JobId": listed["job"], "JobState": state_from_files(listed)}]:
            yield ROW.format(
                listed["step"],
                job_name(task),
                task["JobState"],
                task.get("Restarts", "-"),
                task["RunTime"] if task.get("RunTime") and where_it_ran(task) else "-",
                where(task),
            )
    yield from training(run)
    yield from newest_log(jobs, lines)


def tasks_of(listed: JobForm) -> list[dict[str, str]]:
    """SLURM's description of a job, or of each array task: from the controller, or from sacct for older jobs."""
    asked = _output("scontrol", "--oneliner", "show", "job", listed["job"])
    tasks = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in asked.splitlines()]
    if tasks:
        return sorted(tasks, key=lambda task: int(re.split("[-,%]", task.get("ArrayTaskId", "0"))[0]))
    answer = _output("sacct", "--allocations", "--parsable2", "--noheader", "--format=JobID,State,Elapsed,NodeList",
                   f"--jobs={listed['job']}")  # fmt: skip
    rows = [line.split("|") for line in answer.splitlines()]
    return [
        {"JobId": job, "JobState": state.split()[0], "RunTime": elapsed, "NodeList": nodes}
        for job, state, elapsed, nodes in rows
    ]


def _output(*command: str) -> str:
    """A command's output; empty if it is missing or fails: sacct needs a database."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def state_from_files(listed: JobForm) -> str:
    """The state of a job that SLURM no longer knows, from its result files."""
    return "ended" if len(files_of(listed, "result.pkl")) >= listed["parts"] else "unknown"


def files_of(listed: JobForm, *kinds: str) -> list[Path]:
    """Files that submitit wrote for the tasks of a job."""
    name = re.compile(rf"{listed['job']}(_[0-9]+)+_({'|'.join(map(re.escape, kinds))})")
    try:
        return [path for path in Path(listed["logs"]).iterdir() if name.fullmatch(path.name)]
    except OSError:  # deleted
        return []


def job_name(task: dict[str, str]) -> str:
    if "ArrayTaskId" in task:
        return f"{task['ArrayJobId']}_{task['ArrayTaskId']}"
    return task["JobId"]


def where_it_ran(task: dict[str, str]) -> str:
    return task.get("NodeList", "").replace("(null)", "").replace("None assigned", "")


def where(task: dict[str, str]) -> str:
    """Why a task waits or ended, or its nodes."""
    reason = task.get("Reason", "None")
    waits_for = f" ({task['Dependency']})" if task.get("Dependency", "(null)") != "(null)" else ""
    if task["JobState"] == "FAILED" and "ExitCode" in task:
        return f"exit status {task['ExitCode'].partition(':')[0]}"
    return f"{reason}{waits_for}" if reason != "None" else where_it_ran(task)


def training(run: Path) -> Iterator[str]:
    """The last line of the training log, and the time left at its rate."""
    log = RunFolder(run).log
    needed = {"step", "loss", "samples_per_second"}
    steps = [line for line in read_log(log) if line.get("loss") is not None and needed <= line.keys()]
    if not steps:
        return
    last, rate = steps[-1], steps[-1]["samples_per_second"] or 0
    try:
        train = read_recipe(run).train
        total = wanted_samples(train)
    except UserError as error:
        yield f"\ntraining: {last['samples']:,} samples, loss {last['loss']:.4f}; {error}"
        return
    left = max(0, total - last["samples"])
    when = f"done in {_duration(left / rate)} at this rate" if rate > 1e-9 else "no rate yet"
    when = when if left else "done"
    if left and train.max_hours is not None:
        when += f", or after {train.max_hours:g} hours of training"
    age = _duration(time.time() - log.stat().st_mtime)
    yield ""
    yield (
        f"training: step {last['step']:,}, {last['samples']:,} of {total:,} samples, loss {last['loss']:.4f}, "
        f"{rate:.1f} samples/s, {when} (logged {age} ago)"
    )


def _duration(seconds: float) -> str:
    minutes, hours = int(seconds // 60) % 60, int(seconds // 3600)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {int(seconds) % 60} s"


def newest_log(jobs: list[JobForm], lines: int) -> Iterator[str]:
    """The end of the log file that was written last."""
    logs = [path for listed in jobs for path in files_of(listed, "log.out", "log.err")]
    logs = [path for path in logs if path.is_file() and path.stat().st_size]
    if not logs or not lines:
        return
    newest = max(logs, key=lambda path: path.stat().st_mtime)
    written = newest.read_text(errors="replace").splitlines()
    yield f"\n{newest}:"
    for line in [line for line in written if line.strip()][-lines:]:
        yield f"  {printable(line)}"


if __name__ == "__main__":
    sys.exit(main())
