"""What the shell proposes for the word that is being typed: options, files, fields of a recipe and their values."""

import argparse
from typing import Any, Literal, get_args, get_origin

import argcomplete
from argcomplete.completers import FilesCompleter

from common.loading import recipe_fields
from common.recipe.fields import Place
from slurm.plain_yaml import members


def complete(parser: argparse.ArgumentParser) -> None:
    """Answers the shell that has started this program with its question in the environment, and ends it."""
    for action in parser._actions:
        names = str(action.metavar or "").split("|")
        if action.dest == "overrides":
            action.completer = complete_override  # type: ignore[attr-defined]
        elif len(names) > 1:
            action.choices = names
    Finder()(parser)


class Finder(argcomplete.CompletionFinder):
    """Also completes a field that comes after options, where argcomplete expects no more arguments."""

    def collect_completions(self, active_parsers: Any, parsed_args: Any, cword_prefix: str) -> list[str]:
        found = super().collect_completions(active_parsers, parsed_args, cword_prefix)
        takes_fields = any(action.dest == "overrides" for action in active_parsers[0]._actions)
        fields = complete_override(cword_prefix) if takes_fields and not found else []
        return [*found, *(field for field in fields if field.startswith(cword_prefix))]


def complete_override(prefix: str, **_: Any) -> list[str]:
    """`section.field=` for a word that begins a field, and that with each value or file for one that names it."""
    field, named, value = prefix.partition("=")
    fields = dict(recipe_fields())
    if not named:
        return [f"{name}=" for name in fields]
    if field not in fields:
        return []
    hint = fields[field]
    values = FilesCompleter()(value) if hint in (Place, Place | None) else _values(hint)
    return [f"{field}={each}" for each in values]


def _values(hint: Any) -> list[str]:
    """Of a type that has few."""
    found: list[str] = []
    for part in members(hint):
        if get_origin(part) is Literal:
            found += map(str, get_args(part))
        elif part is bool:
            found += ["true", "false"]
        elif part is type(None):
            found.append("null")
    return found
