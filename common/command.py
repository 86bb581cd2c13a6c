"""The command line that every stage shares: `--config recipe.yaml [section.field=value ...] [--dry-run]`.

Resolve, check, print, and only then work. Exit status 2 and one line on stderr for a user's mistake; status 75 and one
line for a command that was asked to stop and has saved its work.
"""

import argparse
import difflib
import io
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from common.errors import INTERRUPTED, Interrupted, Refused, UserError, printable
from common.files import not_writable
from common.recipe import Recipe
from common.stage import Stage, the_recipe
from slurm.paths import expanded


def run_command(
    description: str,
    plan: Callable[[Recipe], Iterable[str]],
    work: Callable[[Recipe], None],
    argv: Sequence[str] | None = None,
) -> int:
    """Runs a command that is no stage of a run, and returns its exit status. `plan` and `work`: as of a `Stage`; `work`
    says itself how it ended.
    """
    stage = Stage(name="", resolve=the_recipe, plan=plan, finished=lambda _: False, work=work)
    return run_stage_command(description, stage, argv)


def run_stage_command(description: str, stage: Stage, argv: Sequence[str] | None = None) -> int:
    """Runs one stage in this process, or with `--cluster` in jobs where it has parts, and returns the exit status.

    `description` is the script's docstring, which `--help` shows.
    """
    parser = argument_parser(description)
    if stage.part is not None:
        add_job_options(parser)
    return exit_status_of(lambda: _run(parser.parse_intermixed_args(argv), stage))


class Parser(argparse.ArgumentParser):
    """Of one command; it also says what the shell can complete. `description` is the script's docstring."""

    def __init__(self, description: str | None, **others: Any) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **others)
        self._asked_by_shell = "_ARGCOMPLETE" in os.environ

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._answer_shell()
        return super().parse_known_args(args, namespace)

    def parse_known_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._answer_shell()
        return super().parse_known_intermixed_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """As of every other mistake: one line, and status 2."""
        say(f"error: {self._in_our_words(message)}")
        sys.exit(2)

    def _in_our_words(self, message: str) -> str:
        if found := re.fullmatch(r"the following arguments are required: (.*)", message):
            optional = {action.metavar for action in self._actions if action.nargs == "*"}
            missing = [name for name in found[1].split(", ") if name not in optional]
            return f"{', '.join(missing)}: missing; --help shows how the command is written"
        if found := re.fullmatch(r"unrecognized arguments: (\S+).*", message, re.DOTALL):
            near = difflib.get_close_matches(found[1].partition("=")[0], self._option_string_actions, n=1)
            takes = any(action.dest == "overrides" for action in self._actions)
            fields = "; fields of a recipe are written section.field=value" if takes else ""
            return f"{found[1]}: no such argument; " + (
                f"did you mean {near[0]}?" if near else f"--help lists all{fields}"
            )
        return message.removeprefix("argument ")

    def _answer_shell(self) -> None:
        if self._asked_by_shell:
            from common.completion import complete

            self._asked_by_shell = False
            complete(self)


def argument_parser(description: str) -> Parser:
    parser = Parser(description, epilog="docs/recipe.md explains every field of a recipe.")
    parser.add_argument(
        "--config",
        required=True,
        type=path_argument,
        metavar="RECIPE.yaml",
        help="the recipe, such as recipes/demo.yaml",
    )
    parser.add_argument("--dry-run", action="store_true", help="resolve, check and print the plan; touch nothing")
    parser.add_argument("--full", action="store_true", help="with --dry-run: every field, not only what is no default")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher inserts it
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="replace one field, such as train.batch_size=64"
    )
    return parser


def show_recipe(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """The first lines of a dry run: what differs from the defaults or, with `--full`, all fields."""
    from common.loading import differences, dump_recipe

    if arguments.full:
        print(dump_recipe(recipe))
        return
    print(f"recipe: {printable(str(arguments.config))}, and what in it is not the default:")
    print("\n".join(f"  {line}" for line in differences(recipe)))


def path_argument(text: str) -> Path:
    """The `type` of an argument that is a path, which is expanded as paths in a recipe are."""
    try:
        return Path(expanded(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def output_argument(text: str) -> Path:
    """As `path_argument`, of a file that will be written: refused before the work where it cannot be."""
    path = path_argument(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder; name a file")
    if fault := not_writable(path.parent):
        raise argparse.ArgumentTypeError(f"{path}: {fault}; name another")
    return path


def count_argument(text: str) -> int:
    """The `type` of a number of things."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}; a whole number, at least 1")
    return int(text)


def add_job_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cluster",
        metavar="local|debug|slurm|auto",
        help="work in jobs: on this machine, in this process, on SLURM, or on SLURM if it answers",
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="with --cluster: how many; launch.jobs otherwise")
    add_force_option(parser)


def add_force_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="start the jobs although a stage's check refuses them")


@contextmanager
def unless_forced(arguments: argparse.Namespace) -> Iterator[None]:
    """Around the checks before jobs start: `--force` makes warnings of their faults. Says that nothing was started."""
    try:
        yield
    except Refused as refusal:
        if arguments.force:
            for fault in refusal.faults:
                say(f"warning: {fault}")
            return
        if not arguments.dry_run:
            say("nothing was started, because jobs would end with what follows; --force starts them all the same")
        raise


def exit_status_of(work: Callable[[], None]) -> int:
    """Exit status of `work`: 0; 2 for a UserError or a path that is closed to this user, and INTERRUPTED for an
    Interrupted, each with one line on stderr; and without one, as of any program that a shell's pipe ends, 128 +
    SIGPIPE where nobody reads stdout on, as in `| head`.
    """
    _spin_briefly()
    if isinstance(sys.stdout, io.TextIOWrapper):  # escape names that the locale cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        work()
        sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_left():
            raise
        return 128 + signal.SIGPIPE
    except UserError as error:
        for fault in error.faults if isinstance(error, Refused) else [error]:
            say(f"error: {fault}")
        return 2
    except PermissionError as error:
        if error.filename is None:
            raise
        path = printable(str(error.filename))
        say(f"error: {path}: this user may not read it; ask its owner for access, or name another")
        return 2
    except Interrupted as interruption:
        say(f"interrupted: {interruption}")
        return INTERRUPTED
    except KeyboardInterrupt:
        say("interrupted: by Ctrl-C; the same command again goes on from what is finished")
        return 128 + signal.SIGINT
    return 0


def _reader_left() -> bool:
    """Whether stdout can no longer be written; what is left in its buffer then goes nowhere."""
    looked = select.poll()
    looked.register(sys.stdout, 0)  # errors are reported without being asked for
    if not looked.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _spin_briefly() -> None:
    """Limits how long a thread that waits for the others of a loop keeps its core busy. To be called before torch is
    imported.

    GNU's OpenMP spins 300,000 rounds by default, on a core that another program may want. Beside two others, a step of
    convolutions on two cores took 2.0 s, and takes 0.5 s so (alone 0.17 s, either way; AMD EPYC).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Makes SIGTERM and a closed terminal raise SystemExit, so that whoever waits for jobs can end them first: they
    run in processes of their own, or on a cluster.
    """

    def leave(number: int, _frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if not outlived(number)]
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Sent by SLURM at a time limit or preemption, by submitit, by launchers, by Ctrl-C, and by a terminal that is closed.
# Each asks training to save and to stop; `common.elastic` blocks them until its ranks can answer.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)


def outlived(number: int) -> bool:
    """Whether this signal is ignored on purpose: SIGHUP, under `nohup`."""
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


def say(line: str) -> None:
    """Writes one line to stderr in one call, because ranks that end together share a terminal."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _run(arguments: argparse.Namespace, stage: Stage) -> None:
    from common.loading import load_recipe
    from common.ranks import rank_and_world_size
    from common.recipe import describe_network
    from common.rendezvous import rendezvous
    from common.stage_times import ORDER

    in_jobs, forced = getattr(arguments, "cluster", None) is not None, getattr(arguments, "force", False)
    if stage.part is not None:
        _refuse_job_options(arguments)
    recipe = load_recipe(arguments.config, arguments.overrides)
    if stage.ranks_share and not arguments.dry_run and not in_jobs:  # before what can take one rank longer
        rendezvous()
    first = rank_and_world_size()[0] == 0
    if first and arguments.dry_run:
        show_recipe(recipe, arguments)
        print(f"plan: {describe_network(recipe)}")
    if in_jobs:
        run_jobs = _checked_jobs(recipe, stage, arguments)
    resolved = (
        None if in_jobs and forced else stage.resolve(recipe)
    )  # its jobs may see files that this machine does not
    for line in () if forced else stage.plan(resolved):
        if first:
            print(line if line.startswith("warning:") else f"plan: {line}", flush=True)
    if arguments.dry_run:
        if first and stage.name in ORDER:
            print(f"plan: time, disk and memory: pipeline/run.py --dry-run --stages {stage.name} says them")
        return
    started = time.monotonic()
    if in_jobs:
        with ended_by_signals():
            run_jobs()
    else:
        stage.work(resolved)
    if first and stage.name:
        print(f"{stage.name}: done in {time.monotonic() - started:.0f} s, {stage.place(recipe)}", flush=True)


def _refuse_job_options(arguments: argparse.Namespace) -> None:
    if arguments.jobs is not None and (arguments.cluster is None or arguments.jobs < 1):
        raise UserError(f"--jobs: {arguments.jobs}; at least 1, and together with --cluster")
    if arguments.force and (arguments.cluster is None or arguments.dry_run):
        raise UserError("--force: only where jobs are started, with --cluster and without --dry-run; leave it out")


def _checked_jobs(recipe: Recipe, stage: Stage, arguments: argparse.Namespace) -> Callable[[], object]:
    """Checks a stage before its jobs; returns what runs them."""
    from common.recipe import launch_of, own_launch
    from common.stage_checks import check_stages
    from common.stage_jobs import run_in_jobs
    from slurm.cluster import resolve

    try:
        cluster = resolve(arguments.cluster)
    except ValueError as error:
        raise UserError(str(error)) from None
    jobs, own = arguments.jobs or launch_of(recipe.launch, stage.name).jobs, own_launch(recipe.launch, stage.name)
    if jobs > 1 and (own.nodes or own.processes):
        raise UserError(
            f"--jobs: {jobs} jobs have one process each, and launch.stages.{stage.name} has nodes or processes; leave "
            "one of the two out"
        )
    with unless_forced(arguments):
        check_stages(recipe, [stage], cluster, jobs, fetches=not arguments.dry_run)
    return lambda: run_in_jobs(recipe, stage, cluster, jobs, timed=False)
