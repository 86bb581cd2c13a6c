# PYTHON_ARGCOMPLETE_OK
"""Looks around on the nodes where jobs will run, for two minutes: GPUs, network, disk, signals, weights.

    python slurm/preflight.py --config recipes/demo.yaml                          # this machine
    torchrun --nproc-per-node 2 slurm/preflight.py --config recipes/demo.yaml
    python slurm/preflight.py --config recipes/imagenet256.yaml --cluster slurm   # nodes as training asks for them

Prints what it found, and lines for the site file; ends with status 2 where something must change. In SLURM the job lets
itself be requeued once, as training does at its time limit: that can take two minutes more.
"""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

from common.command import argument_parser, ended_by_signals, exit_status_of
from common.errors import Interrupted, Refused, UserError, errors_as
from common.recipe import Recipe, launch_of
from slurm.node_checks import CHECKS, Finding, Node, requeue, site_page

MINUTES = 4  # time limit of the job
SHOWN = 4  # different findings of one check


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--cluster", metavar="slurm|local|auto", help="in a job that asks for what training asks for")
    arguments = parser.parse_intermixed_args()

    from common.loading import load_recipe
    from common.rendezvous import rendezvous

    recipe = load_recipe(arguments.config, arguments.overrides)
    if arguments.dry_run:
        print("\n".join(f"plan: {check.__name__.replace('_', ' ')}" for check in (*CHECKS, vae, extractor)))
    elif arguments.cluster is None:
        rendezvous()
        look_around(recipe)
    else:
        with ended_by_signals():
            in_a_job(recipe, arguments.cluster)


def in_a_job(recipe: Recipe, cluster: str) -> None:
    """Raises UserError with what must change, or with SLURM's words where it does not run the job."""
    from common.jobs import Job, failed
    from common.run_folder import RunFolder
    from common.stage_jobs import plain_steps
    from pipeline.training.stage import STAGE
    from slurm.cluster import executor, resolve, run

    try:
        cluster = resolve(cluster)
    except ValueError as error:
        raise UserError(str(error)) from None
    with errors_as(UserError, "preflight: the job did not come to its end"):
        (step,) = plain_steps(recipe, STAGE, cluster)
        asked = replace(step.resources, timeout_minutes=MINUTES, signal_seconds=30)
        queue = executor(cluster, RunFolder(recipe.folder).step_logs("preflight"), f"{recipe.name}-preflight", asked)
        for outcome in run(queue, Job.of("slurm.preflight", look_around.__name__, recipe), failed=failed):
            if failed(outcome):
                raise UserError(outcome["error"])


def look_around(recipe: Recipe) -> None:
    """All checks, on every rank; rank 0 prints. Raises Refused, on all ranks, with what must change."""
    import torch
    import torch.distributed as dist

    from common.ranks import own_device, rank_and_world_size

    rank, world_size = rank_and_world_size()
    device, launch = own_device(), launch_of(recipe.launch, "train")
    recipe.folder.mkdir(parents=True, exist_ok=True)
    node = Node(recipe.folder, device, launch.processes * launch.gpus_per_process, recipe.train.precision)
    first = os.environ.get("SUBMITIT_EXECUTOR") == "slurm" and "SLURM_RESTART_COUNT" not in os.environ
    if first and not requeue(node).must:  # which would say why it cannot be
        raise Interrupted("preflight: asks to be requeued, as training does at its time limit")
    if world_size > 1:
        both = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(both, rank=rank, world_size=world_size, timeout=timedelta(minutes=1))
        node = replace(node, rank=rank, world_size=world_size, gather=gather)
    own = [*(check(node) for check in CHECKS), vae(recipe), extractor(recipe)]
    everywhere = node.gather([(platform.node(), finding) for finding in own])
    if world_size > 1:
        dist.destroy_process_group()
    findings = [each for of_rank in everywhere for each in of_rank]
    if rank == 0:
        print("\n".join([*page(findings), *for_the_site_file()]), flush=True)
    must = dict.fromkeys(f"{finding.check}: {finding.found}; {finding.must}" for _, finding in findings if finding.must)
    if must:
        raise Refused(list(must))


def gather(own: Any) -> list[Any]:
    import torch.distributed as dist

    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    return every


def vae(recipe: Recipe) -> Finding:
    """Whether a node without internet finds the autoencoder."""
    from preprocess.encoding.encoder import find_vae

    if recipe.vae.path is None:
        return Finding("autoencoder", "none: the network draws pixels")
    try:
        folder = find_vae(recipe.vae)
    except UserError as error:
        return Finding("autoencoder", "faulty", str(error))
    if folder is None and recipe.vae.training is not None:
        return Finding("autoencoder", "not trained yet: the first stage of the run does that")
    must = f"{recipe.vae.path} is not here: HF_HOME on a disk that nodes see; run.py --detach downloads it"
    return Finding("autoencoder", f"in {folder}" if folder else "missing", "" if folder else must)


def extractor(recipe: Recipe) -> Finding:
    """Whether a node without internet finds the weights that features are extracted with."""
    from pipeline.features.extractors import find_extractor_weights

    try:
        path = find_extractor_weights(recipe.evaluate).path
    except UserError as error:
        return Finding("extractor", "faulty", str(error))
    must = f"{path} is not here: TORCH_HOME on a disk that nodes see; run.py --detach downloads it"
    return Finding("extractor", f"{path}" if path.is_file() else "missing", "" if path.is_file() else must)


def page(findings: Sequence[tuple[str, Finding]]) -> Iterator[str]:
    """A line for each check, or for each of its different findings, with the hosts that have it."""
    hosts: dict[Finding, list[str]] = {}
    for host, finding in findings:
        hosts.setdefault(finding, []).append(host)
    for check in dict.fromkeys(finding.check for _, finding in findings):
        every = [finding for finding in hosts if finding.check == check]
        for finding in sorted(every, key=lambda each: not each.must)[:SHOWN]:
            where = f" ({', '.join(dict.fromkeys(hosts[finding]))})" if len(every) > 1 else ""
            yield f"{'MUST CHANGE' if finding.must else 'ok':12} {check:14} {finding.found}{where}"
            if finding.must:
                yield f"{'':27} -> {finding.must}"


def for_the_site_file() -> Iterator[str]:
    asked = ["sinfo", "--noheader", f"--nodes={platform.node().split('.')[0]}", "--format=%R|%G|%m"]
    try:
        shown = subprocess.run(asked, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return
    if lines := site_page(shown.stdout if shown.returncode == 0 else ""):
        yield "\nfor slurm/site.yaml, as this node is:"
        yield from (f"  {line}" for line in lines)


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
