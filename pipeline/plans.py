"""How a set's steps are computed: iterations of each, and where solutions are reused.

What is measured on the weights is measured once for a set, and kept beside its samples: every rank, job and later run
draws by the same plan.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from common.errors import UserError
from common.files import write_json
from common.recipe import STRICT, Recipe, denoiser_config, diffusion, latent_shape
from common.sealed import read_json
from fpdm import rng
from fpdm.allocation import allocate
from fpdm.calibration import allocate_measured, calibrate, choose_reuse
from fpdm.denoiser import Denoiser
from fpdm.sampling import build_sampler, guided_steps, sample_noise
from fpdm.sampling import sample as sample_latents

MEASURED = ("adaptive", "calibrated")  # allocations, of the weights' residual curves
REFERENCE_REACH = 4  # numbers of steps are compared with a reference of this many times the largest


@dataclass(frozen=True, config=STRICT)
class Plan:
    """One entry a step, noisiest first; iterations None for DiT, which has none."""

    iterations: list[int] | None
    reuse: list[bool]


def total_iterations(recipe: Recipe) -> int:
    """Of all steps; exact whatever the allocation. ValueError names what does not fit."""
    settings = recipe.sample
    kind = "constant" if settings.allocation in MEASURED else settings.allocation
    return sum(allocate(kind, settings.num_steps, settings.iterations))


def even_iterations(recipe: Recipe) -> list[int] | None:
    """The same budget, constant over the steps: where nothing is measured. None for DiT."""
    steps = recipe.sample.num_steps
    return allocate("constant", steps, total_iterations(recipe) / steps) if recipe.model.kind == "fpdm" else None


def blocks_a_picture(recipe: Recipe) -> int:
    """Transformer blocks of one picture; a step with guidance computes each twice.

    Where iterations are measured and guidance acts in some of the steps alone, as if the iterations were even.
    """
    settings, config, process = recipe.sample, denoiser_config(recipe), diffusion(recipe)
    timesteps = build_sampler(process, settings.sampler, settings.num_steps).timesteps
    guided = guided_steps(timesteps, process.num_timesteps, settings.guidance_scale, settings.guidance_interval)
    if config.kind == "dit" or settings.allocation in MEASURED:
        counts = even_iterations(recipe) or [0] * settings.num_steps
    else:
        counts = allocate(settings.allocation, settings.num_steps, settings.iterations)
    return sum(config.blocks(count) * (1 + twice) for count, twice in zip(counts, guided, strict=True))


def plan(recipe: Recipe, folder: Path, model: Denoiser) -> Plan:
    """The plan of the set in `folder`, from its plan.json; measured first where there is none."""
    path = folder / "plan.json"
    if not path.exists():
        _write_once(path, TypeAdapter(Plan).dump_python(_make(recipe, model)))
    try:
        return TypeAdapter(Plan).validate_python(read_json(path))
    except ValueError:
        raise UserError(f"{path}: no plan of iterations; delete the folder and run python pipeline/sample.py") from None


def draw(recipe: Recipe, model: Denoiser, stream: str, index: torch.Tensor) -> Callable[..., torch.Tensor]:
    """`fpdm.sample` of the samples `index` (B,), with all but steps, iterations and reuse bound."""
    settings, shape = recipe.sample, latent_shape(recipe)
    noise = partial(sample_noise, recipe.seed, index, shape, stream=stream)  # (B, C, h, w)
    noisy = settings.sampler == "ddpm" or (settings.sampler == "ddim" and settings.eta > 0)
    return partial(
        sample_latents,
        model,
        diffusion(recipe),
        noise(),
        labels_of(recipe, index),
        sampler=settings.sampler,
        eta=settings.eta,
        step_noise=(lambda step: noise(step=step)) if noisy else None,
        guidance_scale=settings.guidance_scale,
        guidance_interval=settings.guidance_interval,
        guidance_channels=settings.guidance_channels,
        solver=settings.solver,
    )


def labels_of(recipe: Recipe, index: torch.Tensor) -> torch.Tensor:
    """Label of sample i. "balanced": i % num_classes, as many of each class exactly where the classes divide the number
    of samples; "uniform": drawn, a function of (seed, i).
    """
    classes = recipe.model.num_classes
    if recipe.sample.labels == "balanced":
        return index % classes
    return rng.integers(recipe.seed, "sample/label", index, classes)


def _make(recipe: Recipe, model: Denoiser) -> Plan:
    settings = recipe.sample
    steps = settings.num_steps
    always = [settings.reuse == "always"] * steps
    if model.config.kind == "dit":
        return Plan(None, always)
    index = torch.arange(settings.calibration_samples, device=model.pos_embed.device)
    drawing = draw(recipe, model, "calibrate", index)
    outer = model.config.blocks(0)
    budget = total_iterations(recipe) + outer * steps
    if settings.step_choices:
        choices = (steps, *settings.step_choices)
        best = calibrate(
            drawing,
            block_budget=budget,
            outer_depth=outer,
            step_choices=choices,
            reference_steps=min(REFERENCE_REACH * max(choices), recipe.objective.num_timesteps),
            reference_iterations=max(1, budget // min(choices) - outer),
            reuse=settings.reuse,
        )
        return Plan(best.iterations, best.reuse)
    if settings.allocation in MEASURED:
        counts = allocate_measured(
            drawing,
            settings.allocation,
            steps,
            block_budget=budget,
            outer_depth=outer,
            reuse=settings.reuse == "always",
        )
    else:
        counts = allocate(settings.allocation, steps, settings.iterations)
    return Plan(counts, choose_reuse(drawing, counts) if settings.reuse == "calibrated" else always)


def _write_once(path: Path, value: Any) -> None:
    """The first of several processes wins; what another machine's rounding would have chosen is dropped."""
    own = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    write_json(own, value)
    try:
        os.link(own, path)
    except FileExistsError:
        pass
    finally:
        own.unlink()
