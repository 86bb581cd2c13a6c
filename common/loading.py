"""YAML and `section.field=value` overrides to a checked recipe, or one line that says what is wrong."""

import dataclasses
import difflib
import os
import re
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

import common.recipe
from common.errors import UserError
from common.recipe import Data, Place, Recipe, Train, denoiser_config, diffusion, latent_shape
from slurm.plain_yaml import NULLS, members, read_yaml, settle

VARIABLE = re.compile(r"\$(?:\$|\{([A-Za-z_][A-Za-z0-9_]*)\}|([A-Za-z_][A-Za-z0-9_]*)|\{)")
SHORT = reprlib.Repr()  # of what a recipe has in a wrong place
SHORT.maxstring = SHORT.maxother = 200
SHORT.maxlevel = 3

# What `train` named alone before it had sections.
RENAMED = {
    **{"offload_optimizer": "optimizer.offload", "ema_decays": "ema.decays", "ema_widths": "ema.widths"},
    **{"ema_reference_batch": "ema.reference_batch", "checkpoint_samples": "checkpoint.every_samples"},
    **{"background_saves": "checkpoint.background", "keep_checkpoints": "checkpoint.keep"},
    **{"keep_checkpoint_samples": "checkpoint.keep_every_samples", "log_samples": "log.every_samples"},
    **{"grid_samples": "previews.grid_every_samples", "grid_pictures": "previews.grid_images"},
    **{"distance_samples": "previews.distance_every_samples", "distance_pictures": "previews.distance_images"},
}
FIELDS_OF = ("webdataset", "parquet", "imagenet")  # data.source whose samples have fields of which one may be named


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
    for section, dotted, field in _places(settings):
        section[field] = expanded(dotted, section[field])
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
    settings = TypeAdapter(Recipe).dump_python(recipe, mode="json")
    for section, _, field in _places(settings):
        if "://" not in section[field]:
            section[field] = section[field].replace("$", "$$")
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    # PyYAML writes these as they are, and reads them as the ends of lines.
    return yaml.safe_dump(settings, sort_keys=False) if re.search("[\x85\u2028\u2029]", text) else text


def expanded(field: str, place: str) -> str:
    """The place that `place` names: `~` is the home folder, `$NAME` and `${NAME}` are variables, `$$` is a `$`.

    An address (`s3://...`) stays as it is. Raises UserError naming `field` and what is not known here.
    """
    if "://" in place:
        return place
    if not place:
        raise UserError(f"{field}: empty; name a folder or file, . for the one that you are in")

    def variable(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if found[0] == "$$":
            return "$"
        if name is None:
            raise UserError(f"{field}: {place} has a ${{ without a name and }}; write ${{NAME}}, or $$ for a $")
        if not os.environ.get(name):
            raise UserError(f"{field}: {place} names a variable that is not set, {name}; set it, or write the path")
        return os.environ[name]

    head, slash, rest = place.partition("/")
    if head.startswith("~"):
        home = os.path.expanduser(head)
        if home == head:
            raise UserError(f"{field}: {place}: no user {head[1:]} here; write ./{head} for what is named so")
    else:
        home = VARIABLE.sub(variable, head)
    return home + slash + VARIABLE.sub(variable, rest)


def _parse_yaml(text: str, path: str | Path) -> dict[str, Any]:
    try:
        settings = settle(Recipe, read_yaml(text))
    except ValueError as error:
        raise UserError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: holds {type(settings).__name__}, a recipe is a mapping of sections; see recipes/")
    return settings


def _apply(settings: dict[str, Any], override: str) -> None:
    """Sets one field from `section.field=value`: text where the field takes text, else YAML (`null`, `[0.9, 0.95]`)."""
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
    hint, text = _hints(sections).get(field), text.strip()
    if str in members(hint) and text[:1] not in ("'", '"') and text not in NULLS:
        target[field] = text
        return
    try:
        target[field] = settle(hint, read_yaml(text))
    except ValueError:
        raise UserError(f"{dotted}: {text!r} is not readable as a YAML value; quote it") from None


def _places(settings: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, str]]:
    """What names a folder or a file: its section, its name with the sections before it, and its name alone."""
    for dotted, hint in _fields():
        *sections, field = dotted.split(".")
        section: Any = settings
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        if hint in (Place, Place | None) and isinstance(section, dict) and isinstance(section.get(field), str):
            yield section, dotted, field


def _explain(error: ValidationError) -> str:
    """The first fault as one line: field, what was found, what is allowed."""
    faults = [(_field_path(fault), fault) for fault in error.errors(include_url=False)]
    path, first = faults[0]
    same = [fault for where, fault in faults if where == path]  # a field of two types has a fault of each
    others = f" (and {len(faults) - len(same)} more)" if len(faults) > len(same) else ""
    name = ".".join(path) or "recipe"
    if first["type"] in ("unexpected_keyword_argument", "dataclass_exact_type"):
        return f"{name}: unknown key; {_near(path)}{others}"
    if first["type"] in ("missing", "missing_argument"):
        return f"{name}: missing; every recipe states it{others}"
    reasons = [fault["msg"].removeprefix("Input ") for fault in same]
    wanted, found = " or ".join(r[0].lower() + r[1:] for r in reasons), first["input"]
    return f"{name}: {wanted}; found {SHORT.repr(found)}{_in_decimal(found)}{others}"


def _near(path: Sequence[str]) -> str:
    """What an unknown key may have been meant to be: a field beside it, or one of its name elsewhere."""
    *sections, key = path
    allowed = sorted(_hints(sections))
    near = difflib.get_close_matches(key, allowed, n=1)
    elsewhere = [dotted.rpartition(".") for dotted, _ in _fields()]
    names = {field for _, _, field in elsewhere}
    if "." in key:
        return f"write {key.replace('.', ': {')}: ...{'}' * key.count('.')}"
    if key in RENAMED:
        near = [f"train.{RENAMED[key]}"]
    elif key in names or not near:
        meant = difflib.get_close_matches(key, names, n=1)
        near = [f"{section}.{field}" for section, _, field in elsewhere if section and field in meant]
    return f"did you mean {' or '.join(near)}?" if near else f"allowed: {', '.join(allowed)}"


def _in_decimal(found: Any) -> str:
    """How to write a number that was written otherwise."""
    if isinstance(found, str) and re.fullmatch(r"[-+]?_*[0-9][0-9_]{0,40}", found):
        return f"; write {int(found.replace('_', ''))}"
    return "; write a decimal number" if isinstance(found, str) and re.match(r"[-+]?\.?[0-9]", found) else ""


def _field_path(fault: ErrorDetails) -> list[str]:
    """Where a fault is, without pydantic's own words for the members of a union, such as `constrained-int`."""
    place, classes = fault["loc"], vars(common.recipe)
    known = [part for part in place if isinstance(part, int) or (part.isidentifier() and part not in classes)]
    if fault["type"] == "unexpected_keyword_argument":  # the last part is as the recipe has it
        known = [part for part in place[:-1] if part in known] + [place[-1]]
    return [str(part) for part in known]


def _hints(sections: Sequence[str]) -> dict[str, Any]:
    """The fields below `sections` and their types, found in the dataclasses themselves; none below what is unknown."""
    kind: Any = Recipe
    for section in sections:
        kind = _section(get_type_hints(kind, include_extras=True).get(section))
        if kind is None:
            return {}
    return get_type_hints(kind, include_extras=True)


def _section(hint: Any) -> Any:
    """The dataclass of a field that is a section."""
    return next((part for part in members(hint) if dataclasses.is_dataclass(part)), None)


def _fields(kind: Any = Recipe, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field that is no section, as `train.optimizer.betas`, and its type."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if section := _section(hint):
            yield from _fields(section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hint


def _sampler(recipe: Recipe) -> Any:
    from fpdm.allocation import allocate
    from fpdm.sampling import build_sampler, check_guidance, guided_steps

    settings, latent_channels = recipe.sample, recipe.vae.latent_channels
    check_guidance(latent_channels, settings.guidance_channels or latent_channels, settings.guidance_interval)
    if recipe.model.kind == "fpdm":  # what is measured spends as much as what is even
        kind = "constant" if settings.allocation in ("adaptive", "calibrated") else settings.allocation
        total = sum(allocate(kind, settings.num_steps, settings.iterations))
        _check_step_choices(recipe, total)
    elif settings.step_choices:
        raise ValueError("step_choices: a DiT has no iterations to trade for steps; leave it out")
    process, scale, interval = diffusion(recipe), settings.guidance_scale, settings.guidance_interval
    sampler = build_sampler(process, settings.sampler, settings.num_steps, settings.eta)
    if scale != 1 and not any(guided_steps(sampler.timesteps, process.num_timesteps, scale, interval)):
        raise ValueError(f"guidance_interval: {list(interval)} holds none of the {settings.num_steps} steps; widen it")
    return sampler


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
    _check_fields(recipe.data)
    if recipe.data.follow_links and recipe.data.source in ("webdataset", "parquet"):
        raise ValueError(f"data.follow_links: is of images in folders, and data.source is {recipe.data.source}")
    if recipe.train.batch_size % recipe.data.lanes:
        raise ValueError(f"data.lanes: {recipe.data.lanes} do not divide train.batch_size, {recipe.train.batch_size}")
    _check_training(recipe.train)
    _check_guidance(recipe)
    for section, build in (("model", denoiser_config), ("objective", diffusion), ("sample", _sampler)):
        try:
            build(recipe)
        except ValueError as error:
            raise ValueError(f"{section}.{error}") from None


def _check_fields(data: Data) -> None:
    """Folders have no fields, but their images may be said to have no labels."""
    of_folder = ", which has none alone: all images are one class" if data.source == "folder" else ""
    for field, value in (("image_field", data.image_field), ("label_field", data.label_field)):
        more = of_folder if field == "label_field" else ""
        if value is not None and data.source not in FIELDS_OF and not (more and value == "none"):
            raise ValueError(f"data.{field}: is of {', '.join(FIELDS_OF)}, and data.source is {data.source}{more}")


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


def _check_training(train: Train) -> None:
    if train.zero_stage == 0 and train.precision == "fp16":
        raise ValueError(
            "train.zero_stage: at 0 DeepSpeed does not scale the loss that fp16 needs scaled; use 1, 2 or 3"
        )
    if train.zero_stage == 0 and train.optimizer.offload:
        raise ValueError(
            "train.optimizer.offload: ZeRO stage 0 has no optimizer of its own to move; use train.zero_stage 1, 2 or 3"
        )
    if train.zero_stage == 3 and train.compile:
        raise ValueError("train.compile: not with zero_stage 3, which changes parameters' shapes; use 0, 1 or 2")
    if not (train.ema.decays or train.ema.widths):
        raise ValueError("train.ema.decays: sampling needs an average; give one, such as [0.9999]")
