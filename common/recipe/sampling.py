"""Sampling, its evaluation, and sweeps over ways of sampling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, StrictBool
from pydantic.dataclasses import dataclass

from common.recipe.fields import (
    STRICT,
    AtLeastZero,
    Count,
    CountOrZero,
    Fraction,
    Place,
    Positive,
    SamplesSeen,
    Some,
    TwoOrMore,
)
from common.recipe.network import diffusion

if TYPE_CHECKING:
    from common.recipe import Recipe
    from fpdm.samplers import SamplerSettings

# Fields of both `Sample` and `Sweep`, which are combined with one another.
SWEEP_AXES = (
    *("sampler", "order", "spacing", "spacing_power", "allocation", "reuse", "start_extrapolation", "guidance_scale"),
    *("iterate_guidance", "ema"),
)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Sample:
    """How images are generated."""

    num_samples: Annotated[Count, Field(le=1_000_000_000)] = 50_000
    """Images that are generated."""
    batch_size: Count = 32
    """Images that one process generates at once. Image i does not depend on it."""
    chunk_samples: Count = 1000
    """Images in one file, and the most that a kill costs."""
    output: Literal["chunks", "features", "webdataset", "npz", "folder"] = "chunks"
    """What is kept. `chunks`: arrays. `features`: only what the evaluation's extractor computes, and the first images.
    `webdataset`: tars of PNGs. `npz`: chunks, then one file for ADM's evaluator (arr_0). `folder`: chunks, then
    PNGs."""
    labels: Literal["balanced", "uniform"] = "balanced"
    """`balanced`: the same number of images of each class (one more of the first classes if num_samples is no
    multiple of their number), worth about 0.1 FID. `uniform`: drawn at random."""
    rounding: Literal["half_away", "truncate"] = "half_away"
    """To 8 bits. `half_away`: to the nearest level, as DiT. `truncate`: half a level darker, as REPA and EDM2."""
    sampler: Literal["ddpm", "ddim", "multistep", "dpm++", "unipc", "flow_euler"] = "ddpm"
    """`multistep` also uses the predictions of the steps before and suits every prediction; `flow_euler` goes with
    prediction flow, the others with the other predictions."""
    eta: Fraction = 0.0
    """Noise of ddim and multistep, from 0 (deterministic) to 1 (as much as ddpm's)."""
    order: Literal[1, 2, 3] = 2
    """Order of multistep. 1: ddim."""
    variance: Literal["small", "large"] = "small"
    """Variance of a step of ddpm where the network has learned none: the posterior's, or beta (Ho et al., NeurIPS
    2020)."""
    spacing: Literal["linspace", "trailing", "leading", "log_snr"] = "linspace"
    """Timesteps of ddpm, ddim and multistep. `linspace`: evenly from the first to the last, as published. `trailing`:
    evenly from the last, and as long a step to the data (Lin et al., WACV 2024). `leading`: evenly from the first.
    `log_snr`: evenly in noise to signal to the power of 1/7 (Karras et al., NeurIPS 2022)."""
    spacing_power: Positive = 1.0
    """With spacing `trailing`: timesteps are T (1 - i / num_steps) ** spacing_power. Above 1: more near the data."""
    num_steps: Count = 28
    """Timesteps at which the network is evaluated; at most objective.num_timesteps."""
    iterations: Count | Positive | tuple[CountOrZero, ...] = 8
    """Fixed point iterations: the mean of a step, or for allocation `list` one number a step, noisiest first. 28 steps
    of 8 with one explicit block before and one after are the paper's 280 blocks. A step of none, which takes `reuse`
    and cannot be the first, reads out what the steps before found."""
    allocation: Literal["constant", "more_at_noise", "more_at_data", "list", "adaptive", "calibrated"] = "constant"
    """How iterations are distributed over the steps. `adaptive` (one threshold of the residual) is measured on the
    weights. `calibrated`: a sampler is fitted to them, at as many blocks: its timesteps, what it multiplies the
    predictions by, where each step's iteration starts and how it is relaxed, so that latents come near to those of
    many steps and iterations. The fields of the sampler, its steps and its starts then say what is spent, and the way
    that must be beaten. It costs as much as about 15,000 samples, once for a set."""
    reuse: Literal["always", "none"] = "always"
    """Whether a step starts from the previous step's solution."""
    start_extrapolation: Fraction = 0.0
    """Such a start is moved on by this times the last change of the solution, at no cost in blocks."""
    solver: Literal["picard", "anderson"] = "picard"
    """Solver of the fixed point. `picard`: the plain iteration of the paper."""
    tolerance: Positive | None = None
    """A sample stops iterating in a step once its relative residual falls to this; `iterations` is then a maximum.
    null: every sample takes all iterations."""
    calibration_samples: Count = 128
    """Samples to which `calibrated` fits; it judges on as many others. `adaptive` is measured on a batch of them."""
    guidance_scale: AtLeastZero = 1.0
    """Scale of classifier-free guidance. 1: no guidance."""
    guidance_rescale: Fraction = 0.0
    """How far a guided prediction's standard deviation is brought back to the conditional one's (Lin et al., WACV
    2024)."""
    iterate_guidance: AtLeastZero = 0.0
    """Moves a prediction away from that of an earlier iterate by this times their difference; costs the post-layers
    once more. 0: not. For networks trained with train.intermediate_loss."""
    weak_iterate: Count = 1
    """That iterate; steps of as few iterations are not guided by it."""
    guidance_interval: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Guidance by guidance_scale acts where t / T lies in this interval; 1 is pure noise."""
    guidance_channels: Count | None = None
    """The first channels of the latent, on which guidance acts; 3 is what DiT and FPDM published. null: all."""
    weights: Literal["latest"] | SamplesSeen = "latest"
    """Weights of the run: the newest, or those after this number of training samples."""
    ema: str | None = None
    """Average of the weights, as `0.9999` or `power-0.05`. null: the first of train.ema."""
    save_images: Count = 64
    """Images of each set that are drawn into samples.png."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Evaluate:
    """Distances of the samples to the images, and other metrics."""

    feature_extractor: Literal[
        "inception-v3-compat",
        "efficientnet-lite0",
        "efficientnet-lite2",
        "dinov2-vit-l-14-local",
        "dinov2-vit-s-14-local",
    ] = "inception-v3-compat"
    """Network whose features are compared. `inception-v3-compat` gives FID. DINOv2 takes its weights from a local file,
    Facebook's `dinov2_vitl14_pretrain.pth` or `dinov2_vits14_pretrain.pth`."""
    feature_extractor_weights: Place | None = None
    """Local file of the extractor's weights. null: torch-fidelity's download for Inception, the installed package for
    EfficientNet; DINOv2 needs a file."""
    metrics: (
        tuple[Literal["frechet", "spatial", "inception_score", "kid", "precision_recall", "density_coverage"], ...]
        | None
    ) = None
    """`frechet`: FID with Inception's published weights. `spatial`: sFID. null: all that extractor and reference
    allow. `frechet` is always measured, listed or not."""
    batch_size: Count = 64
    """Images whose features one process computes at once."""
    reference: Place | None = None
    """What the samples are compared with: ADM's statistics (.npz), or the folder of another run. null: the training
    images."""
    reference_samples: Count | None = None
    """Training images that are compared with, evenly spaced over all. null: all."""
    seed_ranges: Count = 1
    """Sets of `num_samples` that are generated and measured apart. 3: EDM2's protocol, samples 0..N-1, N..2N-1 and
    2N..3N-1."""
    bootstrap: Literal[0] | TwoOrMore = 0
    """Bootstrap replicates for the standard error of the Fréchet distance, that of at most 50,000 samples. 0: no
    standard error."""
    untrained_baseline: StrictBool = False
    """Also sample and measure the network before its first training step: twice the work."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Sweep:
    """Ways of sampling that `pipeline/sweep.py` compares: every combination, each at every budget of blocks an image.

    A budget is spent on as many steps as it pays for, and on an FPDM what is left on more iterations: all of it without
    guidance. Guidance computes a block twice, and pays for both.
    """

    budgets: Some[Count] = (140, 280, 560)
    """Transformer blocks for one image. The default is the paper's Table 1."""
    iterations: Some[Count] = (8,)
    """About this many iterations a step: the number of steps follows from the budget."""
    num_steps: Some[Count] | None = None
    """Numbers of steps, instead of `iterations`: the iterations follow from the budget."""
    allocation: Some[Literal["constant", "more_at_noise", "more_at_data", "adaptive", "calibrated"]] = ("constant",)
    """As sample.allocation."""
    reuse: Some[Literal["always", "none"]] = ("always",)
    """As sample.reuse."""
    sampler: Some[Literal["ddpm", "ddim", "multistep", "dpm++", "unipc", "flow_euler"]] = ("ddpm", "ddim")
    """As sample.sampler."""
    order: Some[Literal[1, 2, 3]] = (2,)
    """As sample.order."""
    spacing: Some[Literal["linspace", "trailing", "leading", "log_snr"]] = ("linspace",)
    """As sample.spacing."""
    spacing_power: Some[Positive] = (1.0,)
    """As sample.spacing_power."""
    start_extrapolation: Some[Fraction] = (0.0,)
    """As sample.start_extrapolation."""
    guidance_scale: Some[AtLeastZero] = (1.0,)
    """As sample.guidance_scale."""
    iterate_guidance: Some[AtLeastZero] = (0.0,)
    """As sample.iterate_guidance."""
    ema: Some[str | None] = (None,)
    """As sample.ema."""
    distance_to_limit: StrictBool = False
    """Also the distance from the samples of many steps and iterations of the same network and guidance_scale, which
    every way of sampling approximates. They cost 128 steps of 4 iterations (with guidance twice that), for each
    value of guidance_scale and ema."""


def sampler_settings(sample: Sample) -> SamplerSettings:
    """What the recipe says of the sampler beside its name, as `fpdm` takes it."""
    from fpdm.samplers import SamplerSettings

    return SamplerSettings(
        spacing=sample.spacing,
        spacing_power=sample.spacing_power,
        eta=sample.eta,
        order=sample.order,
        variance=sample.variance,
    )


def stated_iterations(sample: Sample) -> list[int]:
    """Of each step, noisiest first: constant where they are measured. ValueError names the unfit field."""
    from fpdm.allocation import MEASURED, allocate

    return allocate(
        "constant" if sample.allocation in MEASURED else sample.allocation, sample.num_steps, sample.iterations
    )


def check_sampling(recipe: Recipe) -> None:
    """Raises ValueError for samples that the network or the sampler cannot give."""
    _check_guidance(recipe)
    try:
        _check_steps(recipe)
    except ValueError as error:
        raise ValueError(f"sample.{error}") from None


def _check_guidance(recipe: Recipe) -> None:
    """Guidance compares a class with the null label: the network must have seen both, and they must differ."""
    for name, scales in (("sample", (recipe.sample.guidance_scale,)), ("sweep", recipe.sweep.guidance_scale)):
        for scale in scales:
            if scale == 1:
                continue
            if recipe.train.label_dropout == 0:
                raise ValueError(
                    f"{name}.guidance_scale: {scale:g} with train.label_dropout 0, whose network never sees the null "
                    "label that guidance needs; set guidance_scale to 1, or train with label_dropout above 0"
                )
            if recipe.model.num_classes == 1:
                raise ValueError(
                    f"{name}.guidance_scale: {scale:g} with model.num_classes 1: a single class says no more than the "
                    "null label, and guidance would double the cost for nothing; set it to 1"
                )


def _check_steps(recipe: Recipe) -> None:
    from fpdm.samplers import build_sampler
    from fpdm.sampling import check_guidance, guided_steps

    settings, latent_channels, process = recipe.sample, recipe.vae.latent_channels, diffusion(recipe)
    # First, because it refuses more steps than there are timesteps, and the next checks make a list of them.
    sampler = build_sampler(process, settings.sampler, settings.num_steps, sampler_settings(settings))
    check_guidance(latent_channels, settings.guidance_channels or latent_channels, settings.guidance_interval)
    if recipe.model.kind == "fpdm":
        _check_iterations(settings)
    else:
        for name in ("start_extrapolation", "solver", "tolerance"):
            found, usual = getattr(settings, name), getattr(Sample, name)
            if found != usual:
                said = "null" if usual is None else usual
                raise ValueError(f"{name}: found {found}, and a DiT has no fixed point iteration; set it to {said}")
    if settings.iterate_guidance:
        _check_iterate_guidance(recipe)
    if settings.start_extrapolation and settings.reuse == "none":
        raise ValueError("start_extrapolation: moves on starts that reuse gives, and reuse is 'none'; set it to 0")
    if settings.guidance_rescale and settings.guidance_scale == 1:
        raise ValueError("guidance_rescale: there is no guidance to rescale with guidance_scale 1; set it to 0")
    scale, interval = settings.guidance_scale, settings.guidance_interval
    if scale != 1 and not any(guided_steps(sampler.timesteps, process.num_timesteps, scale, interval)):
        raise ValueError(f"guidance_interval: {list(interval)} holds none of the {settings.num_steps} steps; widen it")


def _check_iterate_guidance(recipe: Recipe) -> None:
    from fpdm.allocation import MEASURED

    settings = recipe.sample
    if recipe.model.kind == "dit":
        raise ValueError("iterate_guidance: a DiT has no iterates; leave it out")
    if settings.tolerance is not None or settings.solver != "picard":
        raise ValueError("iterate_guidance: reads an iterate of fixed counts of picard; leave out tolerance and solver")
    if settings.allocation == "calibrated":
        raise ValueError("iterate_guidance: not with allocation 'calibrated', whose ways would be guided unequally")
    if settings.allocation not in MEASURED and (most := max(stated_iterations(settings))) <= settings.weak_iterate:
        raise ValueError(
            f"weak_iterate: {settings.weak_iterate}, and no step has more than {most} iterations; lower it"
        )


def _check_iterations(settings: Sample) -> None:
    if 0 in stated_iterations(settings):
        if settings.reuse == "none":
            raise ValueError("iterations: a step of none reads out the last one's solution; set reuse to 'always'")
        if settings.allocation == "adaptive":
            raise ValueError("iterations: allocation 'adaptive' gives each step at least 1; raise the mean to 1")
    if settings.allocation != "calibrated":
        return
    if settings.calibration_samples < 2:
        raise ValueError("calibration_samples: 'calibrated' judges by the spread between samples; set it to 2 or more")
    if settings.sampler == "ddpm" or settings.eta > 0:
        raise ValueError(
            "allocation: 'calibrated' compares samples with those of more steps, and ddpm and eta above 0 draw others "
            "with other steps; set eta to 0, and take another sampler than ddpm"
        )
    for name, usual in (("solver", "picard"), ("tolerance", None), ("reuse", "always")):
        if getattr(settings, name) != usual:
            said = "null" if usual is None else usual
            raise ValueError(f"{name}: allocation 'calibrated' fits a sampler without it; set it to {said}")
    if settings.guidance_scale != 1 and settings.guidance_interval != (0, 1):
        raise ValueError(
            "allocation: 'calibrated' compares ways of equal blocks, and with a guidance_interval they depend on the "
            "timesteps; set it to [0, 1]"
        )
