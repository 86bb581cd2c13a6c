"""How a job asks SLURM for its GPUs: sites differ in the option, and in whether GPUs have types."""

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slurm.cluster import Resources
    from slurm.site_file import Site

# Options that request GPUs; those in GENERIC only if their value names GPUs (`lscratch:100` does not).
GENERIC = ("gres", "tres-per-job", "tres-per-node", "tres-per-socket", "tres-per-task")
GPUS = ("gpus", "gpus-per-node", "gpus-per-socket", "gpus-per-task")
GPU_WORDS = re.compile(r"\b(gpu|mps|shard)\b")


def asks_for_gpus(site: "Site") -> bool:
    """Whether an option of the site requests GPUs; sbatch would refuse a second request, or add it."""
    return any(value is not False and _is_request(option, value) for option, value in site.sbatch.items())


def gives_gpus(site: "Site") -> bool:
    """Whether every job that may use GPUs has some, whatever its recipe says."""
    return asks_for_gpus(site) or site.sbatch.get(site.gpu_option) is False


def gpu_options(site: "Site", resources: "Resources") -> dict[str, Any]:
    """The site's sbatch options with this job's request for GPUs, by sbatch's names; without `false` ones.

    A request in the site file takes the place of the recipe's number. Raises ValueError for a type beside it.
    """
    given = {option: value for option, value in site.sbatch.items() if value is not False}
    if asks_for_gpus(site):
        if resources.gpu_type is not None:
            raise ValueError(
                f"launch.stages: gpu_type {resources.gpu_type}, and the site file's sbatch options request GPUs "
                "themselves; remove one"
            )
        return _without_gpus(given) if resources.without_gpus else given
    count, kind = resources.gpus_per_process * resources.processes, resources.gpu_type or site.gpu_type
    # A cluster without GPUs refuses even a request for 0 GPUs.
    if not count or site.sbatch.get(site.gpu_option) is False:
        return given
    asked = f"{kind}:{count}" if kind else str(count)
    if site.gpu_option == "gres":
        asked = ",".join([*([str(given["gres"])] if "gres" in given else []), f"gpu:{asked}"])
    return given | {site.gpu_option: asked}


def _is_request(option: str, value: object) -> bool:
    return option in GPUS or (option in GENERIC and GPU_WORDS.search(str(value)) is not None)


def _without_gpus(given: dict[str, Any]) -> dict[str, Any]:
    """Of `lscratch:100,gpu:2` the first part stays."""
    kept = {}
    for option, value in given.items():
        others = [part for part in str(value).split(",") if not GPU_WORDS.search(part)]
        if not _is_request(option, value):
            kept[option] = value
        elif option in GENERIC and others:
            kept[option] = ",".join(others)
    return kept
