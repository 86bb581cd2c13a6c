"""How a set is sampled: the sampler, its steps, the iterations of each and where they start.

A plan that is measured on the weights is measured once for a set, and written beside its samples: every rank, job and
later run draws by it.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NotRequired

import torch
from pydantic import Field, with_config
from typing_extensions import TypedDict

from common.errors import UserError
from common.files import folder_lock
from common.recipe import Recipe, Sample, denoiser_config, diffusion, latent_shape, num_classes
from common.recipe.sampling import sampler_settings, stated_iterations
from common.run_folder import SampleFolder
from common.sealed import STRICT, read_sealed, write_sealed
from fpdm import rng
from fpdm.allocation import MEASURED, count_blocks
from fpdm.calibration import Draw, Way, allocate_adaptively, calibrate
from fpdm.denoiser import Denoiser
from fpdm.samplers import SamplerName, SamplerSettings, Spacing, Variance, adds_noise, build_sampler
from fpdm.sampling import UnsoundError, guided_steps, sample_noise, weak_iterates
from fpdm.sampling import sample as sample_latents

REMEDY = "delete the folder and run python pipeline/sample.py"


@with_config(STRICT)
class CoefficientsForm(TypedDict):
    timesteps: list[float]
    kept: list[float]
    weights: list[list[float]]


@with_config(STRICT)
class SettingsForm(TypedDict):
    spacing: Spacing
    spacing_power: float
    eta: float
    order: int
    variance: Variance
    coefficients: NotRequired[CoefficientsForm | None]  # older files have none


@with_config(STRICT)
class WayForm(TypedDict):
    """A `Way`; iterations noisiest first, None of a DiT, which has none."""

    sampler: SamplerName
    sampler_settings: SettingsForm
    num_steps: int
    iterations: list[Annotated[int, Field(ge=0)]] | None
    reuse: bool
    start_extrapolation: float | list[float]
    relaxation: NotRequired[list[float] | None]


class UnsoundSamples(UserError):
    """Samples are non-finite or constant: this way of sampling diverges, or the network is of no use."""


def unmeasured(recipe: Recipe) -> Way:
    """The recipe's own way; where iterations would be measured, they are constant."""
    return _way(recipe.sample, stated_iterations(recipe.sample) if recipe.model.kind == "fpdm" else None)


def blocks_an_image(recipe: Recipe) -> int:
    """Transformer blocks of one image; a step with guidance computes each twice.

    If iterations are measured and guidance covers only some steps, or is by iterates, this is an estimate that assumes
    equal iterations per step.
    """
    config = denoiser_config(recipe)
    return sum(
        (config.blocks(count) + config.post_depth * bool(weak)) * (1 + twice) for count, weak, twice in passes(recipe)
    )


def passes(recipe: Recipe) -> Iterator[tuple[int, int, bool]]:
    """Of each step: iterations (0 of a DiT), the weak iterate that guides it (0: none), and whether guidance by
    guidance_scale computes it twice.
    """
    settings, process = recipe.sample, diffusion(recipe)
    timesteps = build_sampler(process, settings.sampler, settings.num_steps, sampler_settings(settings)).timesteps
    guided = guided_steps(timesteps, process.num_timesteps, settings.guidance_scale, settings.guidance_interval)
    counts = stated_iterations(settings) if recipe.model.kind == "fpdm" else [0] * settings.num_steps
    again = weak_iterates(counts, settings.weak_iterate if settings.iterate_guidance else 0)
    return zip(counts, again, guided, strict=True)


def open_plan(recipe: Recipe, folder: Path, model: Callable[[], Denoiser]) -> Way:
    """How the set in `folder` is drawn, from its plan.json, which is written first where it is missing. `model` gives
    the set's network, if it is needed.

    Raises UserError as `read_plan`, and if a measured plan.json is missing but samples drawn with it exist.
    """
    path, stated = SampleFolder(folder).plan, by_recipe(recipe)
    drawn = any(folder.rglob("chunk-*"))  # looked for first: whoever draws has written the plan before
    if not path.exists():
        if stated is None and drawn:
            raise UserError(f"{path}: gone, and samples were drawn by it; {REMEDY}")
        with folder_lock(folder, f".{path.name}.lock", wait=True):  # one process measures, and the others wait
            if not path.exists():
                write_sealed(path, asdict(stated or _measure(recipe, model())))
    return read_plan(recipe, folder)


def way_of(recipe: Recipe, folder: Path, model: Callable[[], Denoiser]) -> Way:
    """How a set is drawn; where the recipe measures that on the weights, as its samples were, or measured now."""
    return by_recipe(recipe) or open_plan(recipe, folder, model)


def read_plan(recipe: Recipe, folder: Path) -> Way:
    """How the set in `folder` was drawn.

    Raises UserError where its plan.json is damaged, or none of this recipe. What the recipe alone says is written again
    instead, with a warning.
    """
    path, stated = SampleFolder(folder).plan, by_recipe(recipe)
    try:
        plan = _read(path)
        if fault := _misfit(recipe, plan):
            raise UserError(f"{path}: {fault}; {REMEDY}")
    except UserError as error:
        if stated is None or not folder.exists():
            raise
        print(f"warning: {error}; now it is written again", file=sys.stderr, flush=True)
        write_sealed(path, asdict(stated))
        return stated
    return plan


def _read(path: Path) -> Way:
    form: Mapping[str, Any] = read_sealed(path, WayForm, REMEDY)
    try:
        settings = SamplerSettings.stored(form["sampler_settings"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}; {REMEDY}") from None
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in form.items()}
    return Way(**{**fields, "sampler_settings": settings})


def by_recipe(recipe: Recipe) -> Way | None:
    """The recipe's way of sampling; None where it is measured on the weights."""
    if recipe.model.kind == "fpdm" and recipe.sample.allocation in MEASURED:
        return None
    return unmeasured(recipe)


def _way(settings: Sample, iterations: Sequence[int] | None) -> Way:
    """What the settings say, with these iterations."""
    return Way(
        sampler=settings.sampler,
        sampler_settings=sampler_settings(settings),
        num_steps=settings.num_steps,
        iterations=None if iterations is None else tuple(iterations),
        reuse=settings.reuse == "always",
        start_extrapolation=settings.start_extrapolation,
    )


def _misfit(recipe: Recipe, plan: Way) -> str | None:
    """Why a plan does not fit the recipe; None where it does."""
    stated = by_recipe(recipe)
    if stated is not None:
        return None if plan == stated else "not the plan that the recipe says"
    counts = plan.iterations
    if counts is None or len(counts) != plan.num_steps:
        return f"iterations: {len(counts or ())} for {plan.num_steps} steps"
    if recipe.sample.allocation == "adaptive" and plan != _way(recipe.sample, counts):
        return "not the recipe's way of sampling"
    outer = denoiser_config(recipe).blocks(0)
    blocks, budget = (
        count_blocks(counts, outer),
        sum(stated_iterations(recipe.sample)) + outer * recipe.sample.num_steps,
    )
    return None if blocks == budget else f"iterations: {blocks} blocks of a budget of {budget}"


def bind_sampler(recipe: Recipe, model: Denoiser, stream: str, index: torch.Tensor, label: int | None = None) -> Draw:
    """`fpdm.sample` of the samples `index` (B,), with all but the fields of a `Way` bound. `label`: of all of them."""
    settings, shape = recipe.sample, latent_shape(recipe)
    noise = partial(sample_noise, recipe.seed, index, shape, stream=stream)  # (B, C, h, w)
    return partial(
        sample_latents,
        model,
        diffusion(recipe),
        noise(),
        labels_for(recipe, index) if label is None else torch.full_like(index, label),
        step_noise=(lambda step: noise(step=step))
        if adds_noise(settings.sampler, sampler_settings(settings))
        else None,
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
    classes = num_classes(recipe.model)
    if recipe.sample.labels == "balanced":
        return index % classes
    return rng.integers(recipe.seed, "sample/label", index, classes)


def _measure(recipe: Recipe, model: Denoiser) -> Way:
    """Raises UserError where samples of these weights are not sound."""
    try:
        return _measured(recipe, model)
    except ValueError as error:
        kind = UnsoundSamples if isinstance(error, UnsoundError) else UserError
        raise kind(
            f"sample.allocation: {recipe.sample.allocation!r} cannot be measured on these weights: {error}; set it to "
            "'constant'"
        ) from None


def _measured(recipe: Recipe, model: Denoiser) -> Way:
    settings, way, device = recipe.sample, unmeasured(recipe), model.pos_embed.device

    def bind(index: torch.Tensor) -> Draw:
        return bind_sampler(recipe, model, "calibrate", index.to(device))

    if settings.allocation == "adaptive":
        return allocate_adaptively(bind(torch.arange(min(settings.calibration_samples, settings.batch_size))), way)
    found = calibrate(
        bind,
        diffusion(recipe),
        way,
        outer_depth=model.config.blocks(0),
        samples=settings.calibration_samples,
        batch_size=settings.batch_size,
        report=lambda line: print(f"calibrating: {line}", flush=True),
    )
    print(
        f"calibrated: {found.way.sampler}, {found.way.num_steps} steps of iterations {list(found.way.iterations or ())}"
        f": error {found.error:.4f}, by the recipe's own way {found.error_before:.4f}, on "
        f"{settings.calibration_samples} samples that had no part in choosing it",
        flush=True,
    )
    return found.way
