"""The stage `train`. Importing it takes no time: `--help` needs nothing of torch."""

from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError
from common.recipe import Launch, Recipe
from common.run_folder import RunFolder
from common.stage import Input, Stage


def resolve(recipe: Recipe) -> Recipe:
    from preprocess.from_data import from_data

    return from_data(recipe)


def plan(recipe: Recipe) -> Iterator[str]:
    """What training will do, checked against the shards and the number of processes."""
    from common.ranks import rank_and_world_size
    from common.recipe import node_counts, with_world_size
    from pipeline.training.checkpoint import complete_checkpoints
    from pipeline.training.data import open_shards
    from pipeline.training.deepspeed_config import deepspeed_config
    from pipeline.training.identity import total_samples
    from pipeline.training.operations import describe_cost, with_end

    recipe = with_end(recipe)
    settings = recipe.train
    yield f"cost: {describe_cost(recipe)}"
    if recipe.model.kind == "fpdm":
        without, most = settings.max_no_grad_iterations, settings.max_grad_iterations
        with_gradient = f"1 to {most}" if settings.gradient == "sjfb" else f"{most}"
        yield f"iterations a step: 0 to {without} without and {with_gradient} with gradient"
    _, world_size = rank_and_world_size()
    try:
        config = deepspeed_config(with_world_size(recipe, world_size).train, world_size)
    except ValueError as error:
        raise UserError(str(error)) from None
    micro_batch_size, accumulations = config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]
    yield (
        f"steps: {total_samples(settings) // settings.batch_size:,} of {settings.batch_size} samples: "
        f"{world_size} ranks x {micro_batch_size} x {accumulations} accumulations, "
        f"ZeRO {config['zero_optimization']['stage']}"
        f"{'' if settings.max_hours is None else f', {settings.max_hours:g} hours at most'}"
    )
    if recipe.launch.elastic:
        nodes = ", ".join(map(str, node_counts(recipe)))
        yield f"elastic: on SLURM it goes on with {nodes} nodes, the most of these that are there"
    checkpoints = complete_checkpoints(recipe.folder)
    state = "finished" if finished(recipe) else f"resuming {checkpoints[-1].name}" if checkpoints else "new"
    yield f"run folder: {recipe.folder}, {state}"
    look_for_initial_weights(recipe)
    if settings.initial_weights is not None:
        yield f"initial weights: {settings.initial_weights}"
    look_for_checkpoint(recipe)
    samples = len(open_shards(recipe))
    yield f"data: {samples:,} samples in {recipe.data.shards}, {total_samples(settings) / samples:.2f} epochs"


def finished(recipe: Recipe) -> bool:
    from pipeline.training import run

    return run.finished(recipe)


def train(recipe: Recipe) -> None:
    from pipeline.training import run

    run.train(recipe)


def check(recipe: Recipe, cluster: str) -> None:
    """The batch over all ranks, and DeepSpeed's settings, as ranks on such nodes will find them. Raises UserError."""
    from common.recipe import launch_of, with_world_size
    from pipeline.training.deepspeed_config import deepspeed_config

    launch = launch_of(recipe.launch, STAGE.name)
    ranks = launch.nodes * launch.processes
    try:
        deepspeed_config(with_world_size(recipe, ranks).train, ranks, _has_gpus(launch, cluster))
    except ValueError as error:
        raise UserError(str(error)) from None


def look_for_shards(recipe: Recipe) -> None:
    from pipeline.training.data import open_shards

    open_shards(recipe)


def look_for_initial_weights(recipe: Recipe) -> None:
    from common.recipe import denoiser_config
    from pipeline.training.initial import check_initial_weights

    if recipe.train.initial_weights is not None:
        check_initial_weights(Path(recipe.train.initial_weights), denoiser_config(recipe), recipe.objective)


def look_for_checkpoint(recipe: Recipe) -> None:
    """That of `train.resume_from`, where a run has none of its own."""
    from pipeline.training.checkpoint import MARKER, complete_checkpoints

    named = recipe.train.resume_from
    if named is not None and not complete_checkpoints(recipe.folder) and not (Path(named) / MARKER).is_file():
        raise UserError(f"train.resume_from: {named} is no checkpoint; give a folder below a run's checkpoints/")


def _has_gpus(launch: Launch, cluster: str) -> bool:
    """Whether training will see GPUs. Raises ValueError where this machine has fewer than the recipe asks for."""
    import torch

    from slurm.gpus import gives_gpus
    from slurm.site_file import load_site

    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if cluster == "slurm":
        return launch.gpus_per_process > 0 or gives_gpus(load_site())
    if cluster == "debug":  # in this process
        return here > 0
    asked = launch.processes * launch.gpus_per_process
    if here and asked > here:
        raise ValueError(
            f"launch.processes: {launch.processes} with {launch.gpus_per_process} GPUs each, and this machine has "
            f"{here}; each process needs its own: set it to {max(1, here // launch.gpus_per_process)}"
        )
    return min(here, asked) > 0


STAGE = Stage(
    name="train",
    resolve=resolve,
    plan=plan,
    finished=finished,
    work=train,
    ranks_share=True,
    all_processes=True,
    place=lambda recipe: RunFolder(recipe.folder).weights,
    check=check,
    inputs=(
        Input(look_for_shards, ("compose", "encode")),
        Input(look_for_initial_weights),
        Input(look_for_checkpoint),
    ),
)
