"""DeepSpeed's settings: generated from a recipe, or the user's own, checked against it."""

import copy
import json
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError, errors_as
from common.recipe import Train
from pipeline.training.identity import precision

# Settings that the recipe also states: fields of sections, and top-level ones.
STATED = {"zero_optimization": "stage", "bf16": "enabled", "fp16": "enabled"}
ARITHMETIC = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")

EVERY = "*"  # all fields of the section
OURS = "the recipe's optimizer and learning rate are used, which resume exactly"
HARM = "a gradient that is not finite would ruin the weights"
REFUSED: dict[str, dict[str, tuple[Any, str]]] = {  # by section and field: the only value allowed, and the reason
    "optimizer": {EVERY: (None, OURS)},
    "scheduler": {EVERY: (None, OURS)},
    "torch_autocast": {"enabled": (False, "train.precision says it")},
    "tensor_parallel": {EVERY: (None, "ranks share the batch, not the network")},
    "data_types": {"grad_accum_dtype": (None, "the fp32 parameters would lie where no checkpoint finds them")},
    "bf16": {
        "check_grad_overflow": (True, HARM),
        "bf16_master_weights_and_grads": (False, "averages of bf16 weights would stand still"),
        "bf16_optimizer_states": (False, "checkpoints hold fp32 moments"),
    },
    "fp16": {"loss_scale": (0, "a fixed scale that overflows would skip every step without an end")},
    "zero_optimization": {
        "compute_grad_norm": (True, HARM),
        "cpu_offload": (False, "train.optimizer.offload says it"),
        "cpu_offload_params": (False, "offload_param is its name today"),
    },
}


def deepspeed_config(train: Train, world_size: int, on_gpu: bool | None = None) -> dict[str, Any]:
    """DeepSpeed's settings: generated from the recipe, or the user's file, checked against the recipe and completed.

    `train.micro_batch_size` must be resolved (`with_world_size`). `on_gpu`: whether training sees GPUs; None: whether
    this process does. Raises UserError for settings that DeepSpeed lacks, or a file that contradicts the recipe.
    """
    assert train.micro_batch_size is not None
    on_gpu = torch.cuda.is_available() if on_gpu is None else on_gpu
    chosen = precision(train, on_gpu)
    if chosen == "fp16" and not on_gpu:  # DeepSpeed allows it on some CPUs; one rule for all is simpler
        raise UserError(
            "train.precision: fp16 needs a GPU, and training sees none (launch.gpus_per_process says how many a job "
            "asks for); use fp32, or bf16 to try it"
        )
    stage = zero_stage(train, world_size, on_gpu)
    zero: dict[str, Any] = {"stage": stage}
    if train.optimizer.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    generated = {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.batch_size // (train.micro_batch_size * world_size),
        "gradient_clipping": train.optimizer.gradient_clipping,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's AdamW and ours, which save and restore the same everywhere
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": chosen == "bf16"},
        "fp16": {"enabled": chosen == "fp16"},
        "steps_per_print": 2**31,  # the training loop does the printing
    }
    config = generated if train.deepspeed_config is None else _own_config(train.deepspeed_config, generated)
    sharding: Any = config["zero_optimization"]
    if train.optimizer.name == "muon" and (sharding.get("offload_optimizer") or {}).get("device", "none") != "none":
        raise UserError(  # the recipe's own field is refused before
            f"train.deepspeed_config: {train.deepspeed_config} has zero_optimization.offload_optimizer, which only "
            "train.optimizer.name=adamw allows; remove it there"
        )
    if stage == 0 and chosen == "fp32":
        config["gradient_clipping"] = 0.0  # `update` does it there
    return config


def zero_stage(train: Train, world_size: int, on_gpu: bool | None = None) -> int:
    """The stage that is used: 0 for a single rank in fp32, where sharding would cost a tenth of the speed for nothing.

    With a DeepSpeed file of the user's own, or offloading, it is the recipe's.
    """
    alone = world_size == 1 and precision(train, on_gpu) == "fp32"
    return 0 if alone and not (train.optimizer.offload or train.deepspeed_config) else train.zero_stage


def _own_config(path: str, generated: dict[str, Any]) -> dict[str, Any]:
    """The user's file, completed. Settings that the recipe also states must agree, and are filled in if missing."""
    given = _without_auto(_read(path))
    if not isinstance(given, dict):
        raise UserError(f"train.deepspeed_config: {path} holds no JSON object; see deepspeed.json in a run's folder")
    for section, values in given.items():
        if section in (*STATED, *REFUSED) and not isinstance(values, dict):
            raise UserError(f"train.deepspeed_config: {path} has {section} {values!r}; DeepSpeed takes an object there")
        for field, (allowed, reason) in REFUSED.get(section, {}).items():
            value = values if field == EVERY else values.get(field, allowed)
            if value != allowed:
                name = section if field == EVERY else f"{section}.{field}"
                raise UserError(f"train.deepspeed_config: {path} has {name} {value!r}; {reason}: remove it")
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
    for name, value, expected in stated:
        if value != expected:
            raise UserError(
                f"train.deepspeed_config: {path} has {name} {value!r}, the recipe and the ranks make it {expected!r}; "
                "correct one of the two, or leave it out there"
            )
    sections = {name: {**given.get(name, {}), field: generated[name][field]} for name, field in STATED.items()}
    config = {**generated, **given, **{name: generated[name] for name in ARITHMETIC}, **sections}
    _ask_deepspeed(path, config)
    return config


def _read(path: str) -> Any:
    def without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name} stands twice")
        return dict(pairs)

    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"train.deepspeed_config: {path}: {error.strerror}") from None
    with errors_as(UserError, f"train.deepspeed_config: {path} is not readable as JSON; correct it there"):
        return json.loads(data.decode(), object_pairs_hook=without_repeated_keys)


def _without_auto(given: Any) -> Any:
    """Without fields of the value "auto", which other trainers fill in: the recipe's or DeepSpeed's values are used."""
    if not isinstance(given, dict):
        return given
    return {name: _without_auto(value) for name, value in given.items() if value != "auto"}


def _ask_deepspeed(path: str, config: dict[str, Any]) -> None:
    """Raises UserError, in DeepSpeed's own words, for settings that it rejects."""
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    alone = {name: value for name, value in copy.deepcopy(config).items() if name != "train_batch_size"}
    try:
        DeepSpeedConfig(alone)  # as for one rank, unless the process group exists
    except (DeepSpeedConfigError, ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        said = " ".join(str(error).split())[:400]
        raise UserError(f"train.deepspeed_config: DeepSpeed does not take {path}: {said}") from None
