"""Trains the denoiser on latent shards with DeepSpeed. Run it again to resume.

python pipeline/train.py --config recipes/demo.yaml
torchrun --nproc-per-node 8 pipeline/train.py --config recipes/imagenet256.yaml train.batch_size=1024
"""

import sys
from collections.abc import Iterator

from common.command import run_command
from common.recipe import Recipe


def plan(recipe: Recipe) -> Iterator[str]:
    """What training will do, checked against the shards and the number of processes."""
    from common.errors import UserError
    from common.ranks import rank_and_world_size
    from common.recipe import with_world_size
    from pipeline.training.checkpoint import complete_checkpoints
    from pipeline.training.data import open_shards
    from pipeline.training.deepspeed_config import deepspeed_config
    from pipeline.training.identity import total_samples
    from pipeline.training.stage import finished

    train = recipe.train
    if recipe.model.kind == "fpdm":
        without, with_gradient = train.max_no_grad_iterations, train.max_grad_iterations
        yield f"iterations a step: 0 to {without} without and 1 to {with_gradient} with gradient"
    _, world_size = rank_and_world_size()
    try:
        config = deepspeed_config(with_world_size(recipe, world_size), world_size)
    except ValueError as error:
        raise UserError(str(error)) from None
    micro_batch_size, accumulations = config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]
    yield (
        f"steps: {total_samples(recipe) // train.batch_size:,} of {train.batch_size} samples: {world_size} ranks x "
        f"{micro_batch_size} x {accumulations} accumulations, ZeRO {config['zero_optimization']['stage']}"
    )
    checkpoints = complete_checkpoints(recipe)
    state = "finished" if finished(recipe) else f"resuming {checkpoints[-1].name}" if checkpoints else "new"
    yield f"run folder: {recipe.folder}, {state}"
    samples = len(open_shards(recipe))
    yield f"data: {samples:,} samples in {recipe.data.shards}, {train.total_samples / samples:.2f} epochs"


def work(recipe: Recipe) -> None:
    from pipeline.training.stage import train

    train(recipe)


if __name__ == "__main__":
    sys.exit(run_command(__doc__, plan, work, shared=True))
