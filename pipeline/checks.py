"""What stages would refuse of a recipe once they have begun, asked before the first of them: by the recipe and what it
asks of the cluster alone."""

from collections.abc import Sequence

from common.errors import UserError
from common.recipe import Recipe, with_world_size
from pipeline.orchestration.stages import Stage, steps
from slurm.cluster import refuse
from slurm.site_file import asks_for_gpus, load_site


def check_stages(recipe: Recipe, stages: Sequence[Stage], cluster: str) -> None:
    """Raises UserError for the first fault of the stages that are not finished; `cluster` is resolved."""
    for stage in stages:
        if stage.finished(recipe):
            continue
        try:
            for step in steps(recipe, stage, cluster):
                refuse(cluster, recipe.folder / "logs" / step.name, step.resources)
            if stage.name == "train":
                _check_training(recipe, cluster)
        except ValueError as error:
            raise UserError(str(error)) from None
        if stage.name == "evaluate":
            _check_evaluation(recipe)


def _check_training(recipe: Recipe, cluster: str) -> None:
    """The batch over all ranks, and DeepSpeed's settings, as ranks on such nodes will find them."""
    from pipeline.training.deepspeed_config import deepspeed_config

    launch = recipe.launch
    ranks = launch.nodes * launch.processes
    deepspeed_config(with_world_size(recipe, ranks), ranks, _has_gpus(recipe, cluster))


def _has_gpus(recipe: Recipe, cluster: str) -> bool:
    """Whether training will see GPUs. Raises ValueError where this machine has fewer than the recipe asks for."""
    import torch

    launch, here = recipe.launch, torch.cuda.device_count() if torch.cuda.is_available() else 0
    if cluster == "slurm":
        return launch.gpus_per_process > 0 or asks_for_gpus(load_site())
    if cluster == "debug":  # in this process
        return here > 0
    asked = launch.processes * launch.gpus_per_process
    if here and asked > here:
        raise ValueError(
            f"launch.processes: {launch.processes} with {launch.gpus_per_process} GPUs each, and this machine has "
            f"{here}; each process needs its own: set it to {max(1, here // launch.gpus_per_process)}"
        )
    return min(here, asked) > 0


def _check_evaluation(recipe: Recipe) -> None:
    from pipeline.evaluation.metrics import ISC_SPLITS, NEIGHBOURHOOD
    from pipeline.features.extractors import wanted_metrics

    wanted_metrics(recipe.evaluate)
    needed = {"inception_score": ISC_SPLITS, "kid": NEIGHBOURHOOD + 1, "precision_recall": NEIGHBOURHOOD + 1}
    for metric in ("frechet", *(recipe.evaluate.metrics or ())):
        fewest = needed.get(metric, 2)
        for field, count in (
            ("sample.num_samples", recipe.sample.num_samples),
            ("evaluate.reference_samples", recipe.evaluate.reference_samples),
        ):
            if metric == "inception_score" and field == "evaluate.reference_samples":
                continue  # it needs no reference
            if count is not None and count < fewest:
                raise UserError(f"{field}: {count}, and the metric {metric} needs {fewest} at least; ask for more")
