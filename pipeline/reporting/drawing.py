"""Images of a run's network in one picture, for whoever wants to look at a class or at a scale of guidance."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from common.errors import UserError
from common.files import atomic_write
from common.ranks import float32_throughout, own_device, share_cores
from common.recipe import Recipe, check_together, denoiser_config
from common.run_weights import load_network
from fpdm.class_names import ClassNames
from fpdm.latents import to_uint8
from pipeline.reporting.comparison import sampled_recipe
from pipeline.reporting.contact_sheet import grid
from pipeline.sampling.generate import draw_images
from pipeline.sampling.models import Models
from pipeline.sampling.plans import blocks_an_image, way_of
from pipeline.sampling.sample_set import sample_set
from preprocess.from_data import class_names, from_data

ENDINGS = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG"}


def draw(folder: Path, name: str | None, guidance: float | None, count: int, seed: int | None, path: Path) -> str:
    """Writes the picture, and says what it shows.

    Args:
        folder: the run's.
        name: a class, by name or number. None: they take turns, as in the run's samples.
        guidance, seed: None for the run's.
        count: images.
        path: the picture, in the format of its ending.

    Raises UserError for a folder that is no run, for a class that there is not, and for guidance that does not fit.
    """
    if path.suffix.lower() not in ENDINGS:
        raise UserError(f"--out: {path}: {path.suffix or 'no ending'}; write {', '.join(ENDINGS)}")
    share_cores()
    float32_throughout()
    recipe = _changed(from_data(sampled_recipe(folder)), guidance, seed)
    names = class_names(recipe)
    label = None if name is None else _label(recipe, names, name)
    samples, device = sample_set(recipe, recipe.sample.weights), own_device()
    model, vae = load_network(samples.weights).to(device), Models(recipe.vae, recipe.evaluate).load_vae(device)
    way = way_of(recipe, samples.folder, lambda: model)
    pixels = torch.cat(
        [
            draw_images(recipe, way, model, vae, index, label)
            for index in torch.arange(count, device=device).split(recipe.sample.batch_size)
        ]
    )  # (count, 3, H, W)
    images = to_uint8(pixels, recipe.sample.rounding).permute(0, 2, 3, 1).cpu().numpy()
    with atomic_write(path) as temporary:
        Image.fromarray(grid(list(images))).save(temporary, format=ENDINGS[path.suffix.lower()])
    of = "of all classes" if label is None else f"of class {names[label] if names else label}"
    cost = f"{blocks_an_image(recipe):,} blocks each, guidance {recipe.sample.guidance_scale:g}"
    return f"drawn: {path}: {count} images {of} after {samples.samples_seen:,} training samples, {cost}"


def _changed(recipe: Recipe, guidance: float | None, seed: int | None) -> Recipe:
    own, seed = recipe.sample, recipe.seed if seed is None else seed
    scale = own.guidance_scale if guidance is None else guidance
    if not 0 <= scale < math.inf:
        raise UserError(f"--guidance: {scale:g}; at least 0, and 1 is none")
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed: {seed} is outside 0..2**32-1")
    sample = replace(own, guidance_scale=scale, guidance_rescale=own.guidance_rescale if scale != 1 else 0.0)
    changed = replace(recipe, sample=sample, seed=seed)
    try:
        check_together(changed)
    except ValueError as error:
        raise UserError(f"{error}" if guidance is None else f"--guidance: {error}") from None
    return changed


def _label(recipe: Recipe, names: Sequence[str] | None, name: str) -> int:
    classes = ClassNames(denoiser_config(recipe), dict(enumerate(names or ())))
    try:
        return int(classes.tensor(int(name) if name.isdecimal() else name)[0])
    except ValueError as error:
        raise UserError(f"--class: {str(error).removeprefix('class_labels: ')}") from None
