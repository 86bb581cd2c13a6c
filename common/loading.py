"""Reads recipes: YAML and `section.field=value` overrides to a checked `Recipe`, or to one line about the fault."""

import dataclasses
import difflib
import re
import reprlib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from common.errors import UserError
from common.recipe import Recipe, check_together
from common.recipe.fields import Place
from slurm import paths
from slurm.plain_yaml import NULLS, members, read_yaml, settle

SHORT = reprlib.Repr()  # for values in error messages
SHORT.maxstring = SHORT.maxother = 200
SHORT.maxlevel = 3

# Fields of `train` from before it had sections, with their places below `train` now.
RENAMED = {
    **{"offload_optimizer": "optimizer.offload", "ema_decays": "ema.decays", "ema_widths": "ema.widths"},
    **{"ema_reference_batch": "ema.reference_batch", "checkpoint_samples": "checkpoint.every_samples"},
    **{"background_saves": "checkpoint.background", "keep_checkpoints": "checkpoint.keep"},
    **{"keep_checkpoint_samples": "checkpoint.keep_every_samples", "log_samples": "log.every_samples"},
    **{"grid_samples": "previews.grid_every_samples", "grid_pictures": "previews.grid_images"},
    **{"distance_samples": "previews.distance_every_samples", "distance_pictures": "previews.distance_images"},
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads `path`, applies overrides in order, and checks the result.

    Raises UserError with one line for the first fault: an unknown key, a wrong type, a value out of range, or fields
    that do not go together.
    """
    return parse_recipe(_read_text(path), overrides, path)


def parse_recipe(
    text: str, overrides: Sequence[str] = (), path: str | Path = "recipe", *, together: bool = True
) -> Recipe:
    """As `load_recipe`, from YAML text; `path` is how its errors name it. `together`: also check fields against one
    another."""
    settings = _parse_yaml(text, path)
    for override in overrides:
        override_field(settings, override)
    for section, dotted, field in _places(settings):
        section[field] = expanded(dotted, section[field])
    try:
        recipe = TypeAdapter(Recipe).validate_python(settings)
    except ValidationError as error:
        raise UserError(f"{path}: {_explain(error)}") from None
    try:
        if together:
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
    # PyYAML writes these unescaped, and reads them as line breaks.
    return yaml.safe_dump(settings, sort_keys=False) if re.search("[\x85\u2028\u2029]", text) else text


def differences(recipe: Recipe) -> list[str]:
    """A line for each field that is not at its default, as `train.batch_size: 32 (default 512)`."""
    own, usual = (TypeAdapter(Recipe).dump_python(one, mode="json") for one in (recipe, Recipe(name=recipe.name)))
    return [f"name: {_shown(recipe.name)}", *_different(own, usual, "")]


def _different(own: dict[str, Any], usual: dict[str, Any] | None, prefix: str) -> Iterator[str]:
    for name, value in own.items():
        if isinstance(value, dict):
            yield from _different(value, None if usual is None else usual[name], f"{prefix}{name}.")
        elif usual is None:  # of a section that is there or not
            yield f"{prefix}{name}: {_shown(value)}"
        elif value != usual[name]:
            yield f"{prefix}{name}: {_shown(value)} (default {_shown(usual[name])})"


def _shown(value: Any) -> str:
    """As YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def expanded(field: str, path: str) -> str:
    """`slurm.paths.expanded`, with a UserError that names `field`."""
    try:
        return paths.expanded(path)
    except ValueError as error:
        raise UserError(f"{field}: {error}") from None


def _read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; recipes/ holds the ones that come with the project") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; recipes/ holds the ones that come with the project") from None


def _parse_yaml(text: str, path: str | Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings of a recipe, over those of the recipe that its `extends` names, relative to its own folder.

    above: the files that extend it.
    """
    try:
        settings = settle(Recipe, read_yaml(text))
    except ValueError as error:
        raise UserError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: holds {type(settings).__name__}, but a recipe is a mapping of sections; see recipes/")
    if "extends" not in settings:
        return settings
    extended, chain = settings.pop("extends"), (*above, Path(path).resolve())
    if not isinstance(extended, str):
        raise UserError(f"{path}: extends: {SHORT.repr(extended)}; it names one recipe, such as ../imagenet256.yaml")
    base = Path(path).parent / expanded("extends", extended)
    if base.resolve() in chain:
        raise UserError(f"{path}: extends: {extended} extends this recipe in turn; leave one of the two out")
    try:
        text = _read_text(base)
    except UserError as error:
        raise UserError(f"{path}: extends: {error}; it is looked for beside this recipe") from None
    return _merged(_parse_yaml(text, base, chain), settings)


def _merged(base: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Fields of `settings` in place of those of `base`, section by section."""
    both = base | settings
    for name in base.keys() & settings.keys():
        if isinstance(base[name], dict) and isinstance(settings[name], dict):
            both[name] = _merged(base[name], settings[name])
    return both


def override_field(settings: dict[str, Any], override: str) -> None:
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
        raise UserError(
            f"{dotted}: {text!r} is not readable as a YAML value; quote it, and close its brackets"
        ) from None


def _places(settings: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Every path in `settings`: the section that holds it, its dotted name, and its name in the section."""
    for dotted, hint in recipe_fields():
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
    name, found = ".".join(path) or "recipe", SHORT.repr(first["input"])
    if first["type"] in ("unexpected_keyword_argument", "dataclass_exact_type"):
        return f"{name}: unknown key; {_near(path)}{others}"
    if first["type"] in ("missing", "missing_argument"):
        if path[-1].isdigit():
            return f"{'.'.join(path[:-1])}: too few values, no number {int(path[-1]) + 1}{others}"
        return f"{name}: missing; every recipe states it{others}"
    if first["type"] == "dataclass_type":
        return f"{name}: is a section, with the fields {', '.join(_hints(path))}; found {found}{others}"
    words = [fault["msg"].removeprefix("Input ").removeprefix("Value error, ") for fault in same]
    reasons = [word.replace("a valid tuple", "a list, as [1, 2]").replace("tuple", "a list") for word in words]
    wanted = " or ".join(reason[0].lower() + reason[1:] for reason in reasons)
    return f"{name}: {wanted}; found {found}{_as_wanted(first)}{others}"


def _near(path: Sequence[str]) -> str:
    """Suggests what an unknown key means: a field beside it, or a field or section with such a name elsewhere."""
    *sections, key = path
    allowed = sorted(_hints(sections))
    below = [dotted for dotted, _ in recipe_fields() if "." in dotted]
    elsewhere = dict.fromkeys([*(dotted.rpartition(".")[0] for dotted in below), *below])
    names = {dotted.rpartition(".")[2] for dotted in elsewhere}
    near = [".".join([*sections, field]) for field in difflib.get_close_matches(key, allowed, n=1)]
    if "." in key:
        return f"write {key.replace('.', ': {')}: ...{'}' * key.count('.')}"
    if key in RENAMED:
        near = [f"train.{RENAMED[key]}"]
    elif key in names or not near:
        meant = difflib.get_close_matches(key, names, n=1)
        near = [dotted for dotted in elsewhere if "." in dotted and dotted.rpartition(".")[2] in meant]
        near = [dotted for dotted in near if not dotted.startswith("launch.stages.")] or near[:1]
    return f"did you mean {' or '.join(near)}?" if near else f"allowed: {', '.join(allowed)}"


def _as_wanted(fault: ErrorDetails) -> str:
    """How to write the number, or the list, that was meant."""
    found, wanted = fault["input"], fault["type"]
    if isinstance(found, str) and re.fullmatch(r"[-+]?_*[0-9][0-9_]{0,40}", found):
        return f"; write {int(found.replace('_', ''))}"
    if wanted == "int_type" and isinstance(found, float) and found.is_integer() and abs(found) < 1e15:
        return f"; write {int(found)}"
    if wanted == "tuple_type" and isinstance(found, str) and re.fullmatch(r"[^\[\]]+,[^\[\]]+", found):
        return f"; write [{', '.join(part.strip() for part in found.split(','))}]"
    return "; write a decimal number" if isinstance(found, str) and re.match(r"[-+]?\.?[0-9]", found) else ""


def _field_path(fault: ErrorDetails) -> list[str]:
    """Where a fault is, without pydantic's own words for the members of a union, such as `constrained-int`."""
    place = fault["loc"]
    known = [part for part in place if isinstance(part, int) or part.isidentifier()]
    if fault["type"] == "unexpected_keyword_argument":  # the last part is as the recipe has it
        known = [part for part in place[:-1] if part in known] + [place[-1]]
    return [str(part) for part in known]


def _hints(sections: Sequence[str]) -> dict[str, Any]:
    """Fields and types of the section at `sections`, from the dataclasses; empty where there is no such section."""
    kind: Any = Recipe
    for section in sections:
        kind = _section(_types(kind).get(section))
        if kind is None:
            return {}
    return _types(kind)


@cache
def _types(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _section(hint: Any) -> Any:
    """The dataclass where a field is a section, else None."""
    return next((part for part in members(hint) if dataclasses.is_dataclass(part)), None)


def recipe_fields(kind: Any = Recipe, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field that is not a section: its dotted name, such as `train.optimizer.betas`, and its type."""
    for name, hint in _types(kind).items():
        if section := _section(hint):
            yield from recipe_fields(section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hint
