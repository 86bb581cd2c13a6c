"""The optimiser under DeepSpeed: settings, learning rate, and an update that is left out where it would harm."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from common.errors import UserError, errors_as
from common.recipe import Recipe
from fpdm.blocks import Block
from fpdm.denoiser import Denoiser
from pipeline.training.identity import precision, total_samples

# What a loss scaler goes on from (fp16 alone has one); its other fields are settings.
SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
STATED = {"zero_optimization": "stage", "bf16": "enabled", "fp16": "enabled"}  # in sections: what the recipe says too
ARITHMETIC = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")


EVERY = "*"  # the whole section
OURS = "the recipe's AdamW and learning rate are used, which resume exactly"
HARM = "a gradient that is not finite would ruin the weights"
REFUSED: dict[str, dict[str, tuple[Any, str]]] = {  # by section and field: what alone is allowed, and why
    "optimizer": {EVERY: (None, OURS)},
    "scheduler": {EVERY: (None, OURS)},
    "torch_autocast": {"enabled": (False, "train.precision says it")},
    "tensor_parallel": {EVERY: (None, "ranks share the batch, not the network")},
    "data_types": {"grad_accum_dtype": (None, "the fp32 parameters would lie where no checkpoint finds them")},
    "bf16": {"check_grad_overflow": (True, HARM)},
    "zero_optimization": {"compute_grad_norm": (True, HARM)},
}


def deepspeed_config(recipe: Recipe, world_size: int, on_gpu: bool | None = None) -> dict[str, Any]:
    """DeepSpeed's own settings: generated, or the user's own file checked against the recipe and completed from it.

    `micro_batch_size` must be resolved (`with_world_size`). `on_gpu`: whether training sees GPUs; None: as here.
    Raises UserError for what DeepSpeed cannot do, or for a
    file that contradicts the recipe.
    """
    settings = recipe.train
    assert settings.micro_batch_size is not None
    on_gpu = torch.cuda.is_available() if on_gpu is None else on_gpu
    chosen = precision(recipe, on_gpu)
    if chosen == "fp16" and not on_gpu:  # DeepSpeed takes some CPUs; a rule that holds on every one is better
        raise UserError(
            "train.precision: fp16 needs a GPU, and training sees none (launch.gpus_per_process says how many a job "
            "asks for); use fp32, or bf16 to try it"
        )
    stage = zero_stage(recipe, world_size, on_gpu)
    zero: dict[str, Any] = {"stage": stage}
    if settings.optimizer.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    generated = {
        "train_batch_size": settings.batch_size,
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.batch_size // (settings.micro_batch_size * world_size),
        "gradient_clipping": settings.optimizer.gradient_clipping,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's own AdamW, which saves and restores the same everywhere
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": chosen == "bf16"},
        "fp16": {"enabled": chosen == "fp16"},
        "steps_per_print": 2**31,  # the training loop does the printing
    }
    config = generated if settings.deepspeed_config is None else _own_config(settings.deepspeed_config, generated)
    if stage == 0 and chosen == "fp32":
        config["gradient_clipping"] = 0.0  # `update` does it there
    return config


def zero_stage(recipe: Recipe, world_size: int, on_gpu: bool | None = None) -> int:
    """The stage that is used: a single rank in fp32 has nothing to share, and sharing costs a tenth of its speed.

    Whoever brings DeepSpeed settings of their own, or offloads, gets what they ask for.
    """
    settings = recipe.train
    alone = world_size == 1 and precision(recipe, on_gpu) == "fp32"
    return 0 if alone and not (settings.optimizer.offload or settings.deepspeed_config) else settings.zero_stage


def _own_config(path: str, generated: dict[str, Any]) -> dict[str, Any]:
    """The user's file; what the recipe states too must agree, and is filled in where the file leaves it out."""
    given = _without_auto(_read(path))
    if not isinstance(given, dict):
        raise UserError(f"train.deepspeed_config: {path} holds no JSON object; see deepspeed.json in a run's folder")
    for section, values in given.items():
        if section in (*STATED, *REFUSED) and not isinstance(values, dict):
            raise UserError(f"train.deepspeed_config: {path} has {section} {values!r}; DeepSpeed takes an object there")
        for field, (allowed, reason) in REFUSED.get(section, {}).items():
            found = values if field == EVERY else values.get(field, allowed)
            if found != allowed:
                name = section if field == EVERY else f"{section}.{field}"
                raise UserError(f"train.deepspeed_config: {path} has {name} {found!r}; {reason}: remove it")
    for target in ("offload_optimizer", "offload_param"):
        section = given.get("zero_optimization", {}).get(target) or {}
        if not isinstance(section, dict):
            raise UserError(
                f"train.deepspeed_config: {path} has zero_optimization.{target} {section!r}; DeepSpeed takes an object "
                "there"
            )
        device = section.get("device", "none")
        if device not in ("none", "cpu"):
            raise UserError(
                f"train.deepspeed_config: {path} has zero_optimization.{target}.device {device!r}, where no checkpoint "
                "finds the numbers; use 'cpu', or leave it out"
            )
    stated = [(name, given.get(name, generated[name]), generated[name]) for name in ARITHMETIC]
    stated += [
        (f"{section}.{field}", given.get(section, {}).get(field, generated[section][field]), generated[section][field])
        for section, field in STATED.items()
    ]
    for name, found, expected in stated:
        if found != expected:
            raise UserError(
                f"train.deepspeed_config: {path} has {name} {found!r}, the recipe and the ranks make it {expected!r}; "
                "correct one of the two, or leave it out there"
            )
    sections = {name: {**given.get(name, {}), field: generated[name][field]} for name, field in STATED.items()}
    config = {**generated, **given, **{name: generated[name] for name in ARITHMETIC}, **sections}
    _ask_deepspeed(path, config)
    return config


def _read(path: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(name for name in names if names.count(name) > 1)} stands twice")
        return found

    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"train.deepspeed_config: {path}: {error.strerror}") from None
    with errors_as(UserError, f"train.deepspeed_config: {path} is not readable as JSON; correct it there"):
        return json.loads(data.decode(), object_pairs_hook=once)


def _without_auto(given: Any) -> Any:
    """ "auto" is what others' programs put numbers of their own for: the recipe's stand there, or DeepSpeed's."""
    if not isinstance(given, dict):
        return given
    return {name: _without_auto(value) for name, value in given.items() if value != "auto"}


def _ask_deepspeed(path: str, config: dict[str, Any]) -> None:
    """Raises UserError with DeepSpeed's own words for what it does not take, or no longer."""
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    alone = {name: value for name, value in copy.deepcopy(config).items() if name != "train_batch_size"}
    try:
        DeepSpeedConfig(alone)  # of one rank, unless there are more already
    except (DeepSpeedConfigError, ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        said = " ".join(str(error).split())[:400]
        raise UserError(f"train.deepspeed_config: DeepSpeed does not take {path}: {said}") from None


def build_engine(recipe: Recipe, model: Denoiser, config: dict[str, Any]) -> Any:
    """DeepSpeed's engine around the model and torch's AdamW."""
    import deepspeed

    settings = recipe.train
    if settings.compile:
        for module in model.modules():
            if isinstance(module, Block):
                module.compile()  # in place: parameters keep their names
    adam = settings.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=adam.learning_rate, betas=adam.betas, weight_decay=adam.weight_decay
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if engine.zero_optimization_stage() == 0 and torch.distributed.get_world_size() == 1:
        engine.enable_backward_allreduce = False  # it would copy every gradient to and fro to add nothing
    return engine


def learning_rate(recipe: Recipe, samples_seen: int) -> float:
    """The rate of the step that starts at `samples_seen`: linear warm-up, then constant or falling to zero."""
    settings = recipe.train.optimizer
    rate = settings.learning_rate
    if settings.warmup_samples:
        rate *= min(1.0, (samples_seen + recipe.train.batch_size) / settings.warmup_samples)
    progress = min(1.0, samples_seen / total_samples(recipe))
    if settings.learning_rate_decay == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * progress))
    elif settings.learning_rate_decay == "linear":
        rate *= 1 - progress
    return rate


def set_learning_rate(engine: Any, rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def spoiled_by(loss: Tensor) -> Tensor:
    """The same loss, to the bit; where it is not finite its gradients are not either, whatever the network's are.

    So one check before the update, that of the gradient's norm over all ranks, covers both.
    """
    return loss * (1 + 0 * loss.detach())


def update(engine: Any, gradient_clipping: float) -> float:
    """The optimiser's step at the end of an accumulation. Returns the norm of the gradient over all ranks, unclipped.

    Where it is not finite, nothing was updated. DeepSpeed sees to that, but in fp32 at stage 0, where it leaves torch's
    optimiser as it is, and this does.
    """
    if not isinstance(engine.optimizer, torch.optim.Optimizer):
        engine.step()
        return float(engine.get_global_grad_norm())
    parameters = list(engine.module.parameters())
    total = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    norm = float(total)
    if math.isfinite(norm) and norm > (gradient_clipping or math.inf):
        clip_grads_with_norm_(parameters, gradient_clipping, total)
    if not math.isfinite(norm):
        for parameter in parameters:
            parameter.grad = None  # the optimiser passes over parameters without a gradient
    engine.step()
    return norm


def scaler_state(engine: Any) -> dict[str, float]:
    """Where the fp16 loss scaler stands; empty where nothing is scaled."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)  # there is one of scale 1 in other precisions too
    if not getattr(scaler, "dynamic", False):
        return {}
    return {name: getattr(scaler, name) for name in SCALER_STATE}


def restore_scaler(engine: Any, state: dict[str, float]) -> None:
    for name, value in state.items():
        setattr(engine.optimizer.loss_scaler, name, value)
