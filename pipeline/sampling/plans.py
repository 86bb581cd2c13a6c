"""How a set's steps are computed: iterations of each, and where solutions are reused.

A plan that is measured on the weights is measured once for a set, and written beside its samples: every rank, job and
later run draws by it.
"""

import os
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, with_config
from typing_extensions import TypedDict

from common.errors import UserError
from common.recipe import Recipe, denoiser_config, diffusion, latent_shape
from common.recipe.sampling import MEASURED, sampler_settings, total_iterations
from common.run_folder import SampleFolder
from common.sealed import STRICT, read_sealed, write_sealed
from fpdm import rng
from fpdm.allocation import allocate
from fpdm.calibration import Draw, allocate_measured, calibrate, choose_reuse
from fpdm.denoiser import Denoiser
from fpdm.samplers import adds_noise, build_sampler
from fpdm.sampling import guided_steps, sample_noise, weak_iterates
from fpdm.sampling import sample as sample_latents

REMEDY = "delete the folder and run python pipeline/sample.py"
REFERENCE_REACH = 4  # numbers of steps are compared with a reference of this many times the largest


@dataclass(frozen=True)
class Plan:
    """One entry a step, noisiest first; iterations None for DiT, which has none."""

    iterations: list[int] | None
    reuse: list[bool]


@with_config(STRICT)
class PlanForm(TypedDict):
    iterations: list[Annotated[int, Field(ge=1)]] | None
    reuse: list[bool]


def even_iterations(recipe: Recipe) -> list[int] | None:
    """The same budget, constant over the steps: where nothing is measured. None for DiT."""
    steps = recipe.sample.num_steps
    return allocate("constant", steps, total_iterations(recipe.sample) / steps) if recipe.model.kind == "fpdm" else None


def unmeasured(recipe: Recipe) -> Plan:
    """The recipe's plan; where it would be measured, constant iterations and reuse in every step."""
    settings = recipe.sample
    return by_recipe(recipe) or Plan(even_iterations(recipe), [settings.reuse != "none"] * settings.num_steps)


def blocks_an_image(recipe: Recipe) -> int:
    """Transformer blocks of one image; a step with guidance computes each twice.

    If iterations are measured, and guidance covers only some steps or is by iterates, this is an estimate that assumes
    equal iterations per step.
    """
    settings, config, process = recipe.sample, denoiser_config(recipe), diffusion(recipe)
    timesteps = build_sampler(process, settings.sampler, settings.num_steps, sampler_settings(settings)).timesteps
    guided = guided_steps(timesteps, process.num_timesteps, settings.guidance_scale, settings.guidance_interval)
    if config.kind == "dit" or settings.allocation in MEASURED:
        counts = even_iterations(recipe) or [0] * settings.num_steps
    else:
        counts = allocate(settings.allocation, settings.num_steps, settings.iterations)
    again = weak_iterates(counts, settings.weak_iterate if settings.iterate_guidance else 0)
    return sum(
        (config.blocks(count) + config.post_depth * bool(weak)) * (1 + twice)
        for count, weak, twice in zip(counts, again, guided, strict=True)
    )


def open_plan(recipe: Recipe, folder: Path, model: Denoiser) -> Plan:
    """The plan of the set in `folder`, from its plan.json, which is written first where it is missing.

    Raises UserError as `read_plan`, and if a measured plan.json is missing but samples drawn with it exist.
    """
    path, stated = SampleFolder(folder).plan, by_recipe(recipe)
    drawn = any(folder.rglob("chunk-*"))  # looked for first: whoever draws has written the plan before
    if not path.exists():
        if stated is None and drawn:
            raise UserError(f"{path}: gone, and samples were drawn by it; {REMEDY}")
        _write_once(path, asdict(stated or _measure(recipe, model)))
    return read_plan(recipe, folder)


def read_plan(recipe: Recipe, folder: Path) -> Plan:
    """The plan that the set in `folder` was drawn by.

    Raises UserError where it is damaged, or none of this recipe. What the recipe alone says is written again instead,
    with a warning.
    """
    path, stated = SampleFolder(folder).plan, by_recipe(recipe)
    try:
        plan = Plan(**read_sealed(path, PlanForm, REMEDY))
        if fault := _misfit(recipe, plan):
            raise UserError(f"{path}: {fault}; {REMEDY}")
    except UserError as error:
        if stated is None or not folder.exists():
            raise
        print(f"warning: {error}; now it is written again", file=sys.stderr, flush=True)
        write_sealed(path, asdict(stated))
        return stated
    return plan


def by_recipe(recipe: Recipe) -> Plan | None:
    """The plan where it is a function of the recipe alone; None where it is measured on the weights."""
    settings = recipe.sample
    always = [settings.reuse == "always"] * settings.num_steps
    if recipe.model.kind == "dit":
        return Plan(None, always)
    if settings.allocation in MEASURED or settings.reuse == "calibrated":
        return None
    return Plan(allocate(settings.allocation, settings.num_steps, settings.iterations), always)


def _misfit(recipe: Recipe, plan: Plan) -> str | None:
    """Why a plan does not fit the recipe; None where it does."""
    settings, stated = recipe.sample, by_recipe(recipe)
    if stated is not None:
        return None if plan == stated else "not the plan that the recipe says"
    steps, counts = len(plan.reuse), plan.iterations
    if steps not in (settings.num_steps, *settings.step_choices) or counts is None or len(counts) != steps:
        return f"iterations and reuse of {len(counts or ())} and {steps} steps, the recipe has {settings.num_steps}"
    if settings.reuse != "calibrated" and set(plan.reuse) != {settings.reuse == "always"}:
        return f"reuse: not {settings.reuse!r} in every step"
    outer = denoiser_config(recipe).blocks(0)
    blocks, budget = sum(counts) + outer * steps, total_iterations(settings) + outer * settings.num_steps
    return None if blocks == budget else f"iterations: {blocks} blocks of a budget of {budget}"


def bind_sampler(recipe: Recipe, model: Denoiser, stream: str, index: torch.Tensor) -> Draw:
    """`fpdm.sample` of the samples `index` (B,), with all but steps, iterations and reuse bound."""
    settings, shape = recipe.sample, latent_shape(recipe)
    noise = partial(sample_noise, recipe.seed, index, shape, stream=stream)  # (B, C, h, w)
    how = sampler_settings(settings)
    return partial(
        sample_latents,
        model,
        diffusion(recipe),
        noise(),
        labels_for(recipe, index),
        sampler=settings.sampler,
        sampler_settings=how,
        step_noise=(lambda step: noise(step=step)) if adds_noise(settings.sampler, how) else None,
        start_extrapolation=settings.start_extrapolation,
        guidance_scale=settings.guidance_scale,
        guidance_rescale=settings.guidance_rescale,
        iterate_guidance=settings.iterate_guidance,
        weak_iterate=settings.weak_iterate,
        guidance_interval=settings.guidance_interval,
        guidance_channels=settings.guidance_channels,
        solver=settings.solver,
    )


def labels_for(recipe: Recipe, index: torch.Tensor) -> torch.Tensor:
    """Label of sample i. "balanced": i % num_classes, as many of each class exactly where the classes divide the number
    of samples; "uniform": drawn, a function of (seed, i).
    """
    classes = recipe.model.num_classes
    if recipe.sample.labels == "balanced":
        return index % classes
    return rng.integers(recipe.seed, "sample/label", index, classes)


def _measure(recipe: Recipe, model: Denoiser) -> Plan:
    settings = recipe.sample
    steps = settings.num_steps
    always = [settings.reuse == "always"] * steps
    index = torch.arange(settings.calibration_samples, device=model.pos_embed.device)
    draw = bind_sampler(recipe, model, "calibrate", index)
    outer = model.config.blocks(0)
    budget = total_iterations(settings) + outer * steps
    if settings.step_choices:
        choices = (steps, *settings.step_choices)
        best = calibrate(
            draw,
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
            draw,
            settings.allocation,
            steps,
            block_budget=budget,
            outer_depth=outer,
            reuse=settings.reuse == "always",
        )
    else:
        counts = allocate(settings.allocation, steps, settings.iterations)
    return Plan(counts, choose_reuse(draw, counts) if settings.reuse == "calibrated" else always)


def _write_once(path: Path, value: Any) -> None:
    """The first of several processes wins; the plans of others, which rounding can make differ, are dropped."""
    own = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    write_sealed(own, value)
    try:
        os.link(own, path)
    except FileExistsError:
        pass
    finally:
        own.unlink()
