"""Encodes pictures to verified latent shards.

    python preprocess/encode_latents.py --config recipes/demo.yaml
    python preprocess/encode_latents.py --config recipes/imagenet256.yaml --cluster slurm --jobs 64

Reads `data.images`, writes WebDataset tars with an index to `data.shards` (the format: preprocess/shards.py). Run it
again after a kill or damage: it makes what is missing and keeps the rest, with any number of jobs.
"""

import argparse
import os
import sys

from common.command import argument_parser, guarded
from common.errors import UserError
from common.recipe import Recipe


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--cluster",
        metavar="local|debug|slurm|auto",
        help="encode in jobs, on this machine, in this process, on SLURM, or on SLURM where it answers",
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="with --cluster: how many; launch.jobs otherwise")
    parser.add_argument(
        "--part", metavar="I/N", help="make only part I (0 to N - 1) of N; the command without it completes the index"
    )
    arguments = parser.parse_intermixed_args()

    from common.loading import dump_recipe, load_recipe

    recipe = load_recipe(arguments.config, arguments.overrides)
    part = parse_part(arguments)
    if arguments.dry_run:
        print(dump_recipe(recipe))
    for line in plan(recipe):
        print(f"plan: {line}", flush=True)
    if arguments.dry_run:
        return
    if part is not None:
        from preprocess.encoding import encode_part

        encode_part(recipe, *part)
    elif arguments.cluster is not None:
        encode_in_jobs(recipe, arguments.cluster, recipe.launch.jobs if arguments.jobs is None else arguments.jobs)
    else:
        encode(recipe)


def parse_part(arguments: argparse.Namespace) -> tuple[int, int] | None:
    """(part, parts) of `--part`. Raises UserError where the options do not go together."""
    if arguments.jobs is not None and (arguments.cluster is None or arguments.jobs < 1):
        raise UserError(f"--jobs: {arguments.jobs}; at least 1, and together with --cluster")
    if arguments.part is None:
        return None
    part, _, parts = arguments.part.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)) or arguments.cluster:
        raise UserError(f"--part: {arguments.part}; write I/N, as 0/4 to 3/4, and leave --cluster out")
    return int(part), int(parts)


def plan(recipe: Recipe) -> list[str]:
    """Checks source, VAE, disk and what is there already; touches nothing."""
    from preprocess.encoding import describe_plan, resolve

    return describe_plan(resolve(recipe, download=False))


def finished(recipe: Recipe) -> bool:
    from preprocess.encoding import resolve

    try:
        return resolve(recipe, download=False).is_finished
    except UserError:  # something is missing or does not fit; the stage says what
        return False


def encode(recipe: Recipe) -> None:
    """The whole stage in this process; returns at once where it is finished."""
    from preprocess.encoding import make_shards, merge_shards, resolve, summarise

    encoding = resolve(recipe, download=True)
    if not encoding.is_finished:
        make_shards(encoding)
        merge_shards(encoding)
    summarise(encoding)


def encode_in_jobs(recipe: Recipe, cluster: str, jobs: int) -> None:
    """The whole stage as an array of jobs, each with one GPU where `launch` asks for any; then the index."""
    from common.jobs import Job, failed
    from preprocess.encoding import merge_shards, resolve, summarise
    from slurm.cluster import Resources, executor, run_array

    encoding = resolve(recipe, download=True)  # here, so that no job downloads what another does
    if encoding.is_finished:
        return summarise(encoding)
    launch = recipe.launch
    resources = Resources(
        cpus_per_process=launch.cpus_per_process,
        gpus_per_process=min(1, launch.gpus_per_process),
        timeout_minutes=launch.timeout_minutes,
    )
    try:
        made = executor(cluster, recipe.folder / "logs" / "encode", "encode", resources)
    except ValueError as error:
        raise UserError(str(error)) from None
    calls = [Job.of("preprocess.encoding", "encode_part", recipe, part=part, parts=jobs) for part in range(jobs)]
    here = 1 if launch.gpus_per_process else max(1, (os.cpu_count() or 1) // launch.cpus_per_process)
    outcomes = run_array(made, calls, at_once=jobs if made.cluster == "slurm" else here, failed=failed)
    for outcome in outcomes:
        if failed(outcome):
            raise UserError(outcome["error"])
    merge_shards(encoding)
    return summarise(encoding)


if __name__ == "__main__":
    sys.exit(guarded(main))
