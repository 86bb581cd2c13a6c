"""A run's weights, its way of sampling and its page as a folder of diffusers."""

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from common.errors import UserError
from common.files import atomic_folder
from common.loading import dump_recipe
from common.ranks import own_device
from common.recipe import Recipe, Sample
from common.run_folder import RunFolder
from common.run_weights import REMEDY, load_network
from fpdm.allocation import MEASURED
from fpdm.calibration import Way
from fpdm.call_settings import FIXED_POINT, CallSettings, setting_names
from fpdm.pipeline_hf import FPDMPipeline
from fpdm.samplers import SamplerSettings
from fpdm.scheduler_hf import FPDMScheduler
from fpdm.transformer_hf import FPDMTransformer2DModel
from pipeline.exporting.model_card import GRID_IMAGES, UNSTATED, Licences, drawn_images, write_card
from pipeline.sampling.plans import labels_for, way_of
from pipeline.sampling.sample_set import sample_set
from preprocess.encoding.encoder import fetch_vae, load_vae
from preprocess.from_data import class_names


def export(recipe: Recipe, licences: Licences = UNSTATED, repository: str | None = None, *, half: bool = False) -> None:
    """Replaces what was exported before. `repository`: where it will be shared, for the card. `half`: in float16.

    Raises UserError where the weights are damaged.
    """
    samples = sample_set(recipe, recipe.sample.weights)
    try:
        transformer = FPDMTransformer2DModel.from_pretrained(samples.weights)
    except ValueError as error:
        raise UserError(f"{error}; {REMEDY}") from None
    names = class_names(recipe)
    way = way_of(recipe, samples.folder, lambda: load_network(samples.weights).to(own_device()))
    pipeline = FPDMPipeline(
        transformer,
        load_vae(folder) if (folder := fetch_vae(recipe.vae)) else None,
        FPDMScheduler(transformer.diffusion, way.sampler, way.sampler_settings),
        dict(enumerate(names or ())),
        call_settings(recipe.sample, way),
    )
    images = drawn_images(recipe.sample.num_samples, samples) or first_images(recipe, pipeline)
    if half:
        pipeline.to(torch.float16)
    target = RunFolder(recipe.folder).pipeline
    with atomic_folder(target) as folder:
        pipeline.save_pretrained(folder)
        (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        write_card(
            folder,
            recipe,
            samples,
            images,
            names=names,
            sampling=shown_settings(pipeline),
            place=repository or str(target),
            licences=licences,
        )
    if names is None:
        print(f"note: classes without names: {recipe.data.shards} has no list of {recipe.model.num_classes} here")
    print(f"pipeline: {target}; its page is README.md")


def shown_settings(pipeline: FPDMPipeline) -> dict[str, Any]:
    """Arguments of a call of the pipeline, and what they are where it leaves them out; without those that are off.
    Instead of numbers that are fitted it says so.
    """
    scheduler = pipeline.scheduler
    values = {**pipeline.config["sampling"], "sampler": scheduler.sampler, **asdict(scheduler.settings)}
    usual = asdict(CallSettings()) | asdict(SamplerSettings())
    fixed = () if pipeline.transformer.config.kind == "dit" else ("iterations", "allocation", "reuse")
    always = ("num_inference_steps", *fixed, "guidance_scale", "sampler")
    if scheduler.sampler == "fitted":
        values |= dict.fromkeys(("coefficients", "start_extrapolation", "relaxation"), "fitted")
    return {name: value for name, value in values.items() if name in always or value != usual.get(name, value)}


def call_settings(settings: Sample, way: Way) -> dict[str, Any]:
    """What a call of the pipeline does by default: what the recipe says."""
    unused = FIXED_POINT if way.iterations is None else ()
    names = [name for name in setting_names() if hasattr(settings, name) and name not in (*unused, "reuse")]
    values: dict[str, Any] = {name: getattr(settings, name) for name in names}
    values["num_inference_steps"] = way.num_steps
    if way.iterations is not None:
        values |= {name: getattr(way, name) for name in ("reuse", "start_extrapolation", "relaxation")}
        if settings.allocation in MEASURED:
            values |= {"allocation": "list", "iterations": way.iterations}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def first_images(recipe: Recipe, pipeline: FPDMPipeline) -> list[NDArray[np.uint8]]:
    """The first samples of the recipe (H, W, 3)."""
    labels = labels_for(recipe, torch.arange(min(GRID_IMAGES, recipe.sample.num_samples)))
    (images,) = pipeline(labels, seed=recipe.seed, return_dict=False)
    return [np.asarray(image) for image in images]
