"""The command line that every stage shares: `--config recipe.yaml [section.field=value ...] [--dry-run]`.

Resolve, check, print, and only then work. Exit status 2 and one line on stderr for a user's mistake; status 75 and one
line where the command was asked to stop and has saved its work.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence

from common.errors import INTERRUPTED, Interrupted, UserError
from common.recipe import Recipe


def run_command(
    description: str,
    plan: Callable[[Recipe], Iterable[str]],
    work: Callable[[Recipe], None],
    argv: Sequence[str] | None = None,
) -> int:
    """Runs one stage and returns its exit status.

    Args:
        description: the script's docstring, shown by `--help`.
        plan: checks the recipe against this machine and says what will be done, a line each; touches nothing. A
            generator shows what it knows before the check that fails.
        work: does it; finds what is finished and goes on from there.
    """
    return guarded(lambda: _run(argument_parser(description).parse_intermixed_args(argv), plan, work))


def argument_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="RECIPE.yaml", help="the recipe, such as recipes/demo.yaml")
    parser.add_argument("--dry-run", action="store_true", help="resolve, check and print the plan; touch nothing")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher inserts it
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="replaces one field, as train.batch_size=64"
    )
    return parser


def guarded(work: Callable[[], None]) -> int:
    """The exit status of `work`: 0, or with one line on stderr 2 for a UserError, INTERRUPTED for an Interrupted."""
    try:
        work()
    except UserError as error:
        _say(f"error: {error}")
        return 2
    except Interrupted as interruption:
        _say(f"interrupted: {interruption}")
        return INTERRUPTED
    return 0


def _say(line: str) -> None:
    """On stderr, in one write: ranks that end together share a terminal."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _run(
    arguments: argparse.Namespace, plan: Callable[[Recipe], Iterable[str]], work: Callable[[Recipe], None]
) -> None:
    from common.loading import dump_recipe, load_recipe
    from common.recipe import describe_network

    recipe = load_recipe(arguments.config, arguments.overrides)
    first = os.environ.get("RANK", "0") == "0"
    if first and arguments.dry_run:
        print(dump_recipe(recipe))
        print(f"plan: {describe_network(recipe)}")
    for line in plan(recipe):
        if first:
            print(f"plan: {line}", flush=True)
    if not arguments.dry_run:
        work(recipe)
