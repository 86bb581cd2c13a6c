"""YAML and `section.field=value` overrides to a checked recipe, or one line that says what is wrong."""

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

import common.recipe
from common.errors import UserError
from common.recipe import Recipe, Train, denoiser_config, diffusion, latent_shape


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads `path`, applies overrides in order, validates everything.

    Raises UserError with one line for the first fault: unknown key, wrong type, value out of range, or fields that do
    not go together.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; recipes/ holds the ones that come with the project") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; recipes/ holds the ones that come with the project") from None
    return parse_recipe(text, overrides, path)


def parse_recipe(text: str, overrides: Sequence[str] = (), path: str | Path = "recipe") -> Recipe:
    """As `load_recipe`, from YAML text; `path` is how its errors name it."""
    settings = _parse_yaml(text, path)
    for override in overrides:
        _apply(settings, override)
    try:
        recipe = TypeAdapter(Recipe).validate_python(settings)
    except ValidationError as error:
        raise UserError(f"{path}: {_explain(error)}") from None
    try:
        check_together(recipe)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back to an equal one."""
    return yaml.safe_dump(TypeAdapter(Recipe).dump_python(recipe, mode="json"), sort_keys=False, allow_unicode=True)


def _parse_yaml(text: str, path: str | Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: holds {type(settings).__name__}, a recipe is a mapping of sections; see recipes/")
    return settings


def _apply(settings: dict[str, Any], override: str) -> None:
    """Sets one field from `section.field=value`; the value is YAML (`null`, `true`, `3`, `[0.9, 0.95]`)."""
    dotted, separator, text = override.partition("=")
    *sections, field = dotted.split(".")
    if not separator or not field or not all(sections):
        raise UserError(f"{override!r}: not an override; write section.field=value, such as train.batch_size=64")
    target = settings
    for section in sections:
        if target.get(section) is None:
            target[section] = {}
        target = target[section]
        if not isinstance(target, dict):
            raise UserError(f"{dotted}: {section} is a value, not a section; write section.field=value")
    try:
        target[field] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"{dotted}: {text!r} is not readable as a YAML value; quote it") from None


def _explain(error: ValidationError) -> str:
    """The first fault as one line: field, what was found, what is allowed."""
    faults = [(_field_path(fault["loc"]), fault) for fault in error.errors(include_url=False)]
    path, first = faults[0]
    same = [fault for where, fault in faults if where == path]  # a field of two types has a fault of each
    others = f" (and {len(faults) - len(same)} more)" if len(faults) > len(same) else ""
    name = ".".join(path) or "recipe"
    if first["type"] in ("unexpected_keyword_argument", "dataclass_exact_type"):
        allowed = sorted(_fields(path[:-1]))
        near = difflib.get_close_matches(path[-1], allowed, n=1)
        hint = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(allowed)}"
        return f"{name}: unknown key; {hint}{others}"
    if first["type"] in ("missing", "missing_argument"):
        return f"{name}: missing; every recipe states it{others}"
    reasons = [fault["msg"].removeprefix("Input ") for fault in same]
    return f"{name}: {' or '.join(r[0].lower() + r[1:] for r in reasons)}; found {first['input']!r}{others}"


def _field_path(location: tuple[int | str, ...]) -> list[str]:
    """pydantic's location without its own words for the members of a union, such as `constrained-int`."""
    classes = vars(common.recipe)
    return [str(part) for part in location if isinstance(part, int) or (part.isidentifier() and part not in classes)]


def _fields(sections: Sequence[str]) -> list[str]:
    """The names allowed below `sections`, found in the dataclasses themselves."""
    kind: Any = Recipe
    for section in sections:
        kind = get_type_hints(kind)[section]
        kind = next((part for part in get_args(kind) if dataclasses.is_dataclass(part)), kind)
    return [field.name for field in dataclasses.fields(kind)]


def _sampler(recipe: Recipe) -> Any:
    from fpdm.allocation import allocate
    from fpdm.sampling import build_sampler, check_guidance

    settings, latent_channels = recipe.sample, recipe.vae.latent_channels
    check_guidance(latent_channels, settings.guidance_channels or latent_channels, settings.guidance_interval)
    if recipe.model.kind == "fpdm":  # what is measured spends as much as what is even
        kind = "constant" if settings.allocation in ("adaptive", "calibrated") else settings.allocation
        total = sum(allocate(kind, settings.num_steps, settings.iterations))
        _check_step_choices(recipe, total)
    elif settings.step_choices:
        raise ValueError("step_choices: a DiT has no iterations to trade for steps; leave it out")
    return build_sampler(diffusion(recipe), settings.sampler, settings.num_steps, settings.eta)


def _check_step_choices(recipe: Recipe, iterations: int) -> None:
    from fpdm.allocation import allocate
    from fpdm.sampling import build_sampler

    settings, outer = recipe.sample, recipe.model.pre_depth + recipe.model.post_depth
    if settings.step_choices and settings.allocation != "calibrated":
        raise ValueError(f"step_choices: allocation {settings.allocation!r} compares none; use 'calibrated'")
    if settings.step_choices and (settings.sampler == "ddpm" or settings.eta > 0):
        raise ValueError("step_choices: ddpm, and eta above 0, draw other samples with other steps; use ddim, eta 0")
    for num_steps in settings.step_choices:
        try:
            allocate("constant", num_steps, block_budget=iterations + outer * settings.num_steps, outer_depth=outer)
            build_sampler(diffusion(recipe), settings.sampler, num_steps)
        except ValueError as error:
            raise ValueError(f"step_choices: {error}") from None


def check_together(recipe: Recipe) -> None:
    """Fields that are right alone and wrong together. Raises ValueError naming one of them."""
    resolution, downsampling = recipe.data.resolution, recipe.vae.downsampling
    if resolution % downsampling:
        raise ValueError(f"data.resolution: {resolution} is not a multiple of vae.downsampling, {downsampling}")
    side = latent_shape(recipe)[1]
    if side % recipe.model.patch_size:
        raise ValueError(f"model.patch_size: {recipe.model.patch_size} does not divide the latents' side of {side}")
    if recipe.data.cache is None and (recipe.data.stage_in or "://" in recipe.data.shards):
        needs = "stage_in" if recipe.data.stage_in else f"shards: {recipe.data.shards}"
        raise ValueError(f"data.{needs} needs data.cache, a folder on a local disk")
    if recipe.train.batch_size % recipe.data.lanes:
        raise ValueError(f"data.lanes: {recipe.data.lanes} do not divide train.batch_size, {recipe.train.batch_size}")
    _check_training(recipe.train)
    for section, build in (("model", denoiser_config), ("objective", diffusion), ("sample", _sampler)):
        try:
            build(recipe)
        except ValueError as error:
            raise ValueError(f"{section}.{error}") from None


def _check_training(train: Train) -> None:
    if train.zero_stage == 0 and train.precision == "fp16":
        raise ValueError(
            "train.zero_stage: at 0 DeepSpeed does not scale the loss that fp16 needs scaled; use 1, 2 or 3"
        )
    if train.zero_stage == 0 and train.offload_optimizer:
        raise ValueError("train.offload_optimizer: ZeRO stage 0 has no optimizer of its own to move; use 1, 2 or 3")
    if train.zero_stage == 3 and train.compile:
        raise ValueError("train.compile: not with zero_stage 3, which changes parameters' shapes; use 0, 1 or 2")
    if not (train.ema_decays or train.ema_widths):
        raise ValueError("train.ema_decays: sampling needs an average; give one, such as [0.9999]")
