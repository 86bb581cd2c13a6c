"""DeepSpeed's engine: learning rate, updates, and the loss scaler's state."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from common.recipe import Train
from fpdm.blocks import Block
from fpdm.denoiser import Denoiser
from pipeline.training.distributed import Ranks
from pipeline.training.muon import MuonAdamW, find_layouts
from pipeline.training.optimizers import build_optimizer

# The state of a loss scaler (only fp16 has one); its other fields are settings.
SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def build_engine(train: Train, model: Denoiser, config: dict[str, Any], ranks: Ranks) -> Any:
    """DeepSpeed's engine around the model and the recipe's optimizer."""
    import deepspeed

    if train.compile:
        for module in model.modules():
            if isinstance(module, Block):
                module.compile()  # in place: parameters keep their names
    optimizer = build_optimizer(train, model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if isinstance(optimizer, MuonAdamW):
        find_layouts(engine, optimizer)
    alone = engine.zero_optimization_stage() == 0 and ranks.world_size == 1
    # DeepSpeed knows no shared memory; where a file of the user's own says how it averages, it does.
    by_update = ranks.shared is not None and isinstance(engine.optimizer, torch.optim.Optimizer)
    if alone or (by_update and train.deepspeed_config is None):
        engine.enable_backward_allreduce = False  # alone, it would copy every gradient and add nothing
    return engine


def set_learning_rate(engine: Any, rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def propagate_non_finite(loss: Tensor) -> Tensor:
    """Identity for a finite loss; makes every gradient non-finite where the loss is.

    So one check before the update, that of the gradient's norm over all ranks, covers both.
    """
    return loss * (1 + 0 * loss.detach())


def update(engine: Any, gradient_clipping: float, ranks: Ranks) -> float:
    """The optimizer's step at the end of an accumulation. Returns the norm of the gradient over all ranks, unclipped.

    Where the norm is not finite, nothing is updated: by DeepSpeed itself, except in fp32 at stage 0, where it uses
    torch's optimizer as it is and this function clips and checks.
    """
    if not isinstance(engine.optimizer, torch.optim.Optimizer):
        engine.step()
        return float(engine.get_global_grad_norm())
    parameters = list(engine.module.parameters())
    if ranks.shared is not None and not engine.enable_backward_allreduce:
        average_gradients(parameters, ranks)
    total = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    norm = float(total)
    if math.isfinite(norm) and norm > (gradient_clipping or math.inf):
        clip_grads_with_norm_(parameters, gradient_clipping, total)
    if not math.isfinite(norm):
        for parameter in parameters:
            parameter.grad = None  # the optimizer passes over parameters without a gradient
    engine.step()
    return norm


def average_gradients(parameters: list[Tensor], ranks: Ranks) -> None:
    """Over all ranks; zeros where this one has none."""
    gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
    together = torch.cat([gradient.flatten() for gradient in gradients]).div_(ranks.world_size)
    ranks.add_up(together)
    parts = together.split([gradient.numel() for gradient in gradients])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)


def scaler_state(engine: Any) -> dict[str, float]:
    """The state of the fp16 loss scaler; empty in other precisions."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)  # other precisions can have one of scale 1
    if not getattr(scaler, "dynamic", False):
        return {}
    return {name: getattr(scaler, name) for name in SCALER_STATE}


def restore_scaler(engine: Any, state: dict[str, float]) -> None:
    for name, value in state.items():
        setattr(engine.optimizer.loss_scaler, name, value)
