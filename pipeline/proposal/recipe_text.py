"""A recipe as a person reads it: sections of YAML in the reference's order, a reason after every value."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml


class Setting(NamedTuple):
    """One field, such as `train.batch_size`, with its value and the reason for it."""

    field: str
    value: Any
    reason: str


def recipe_text(settings: Sequence[Setting], heading: str = "") -> str:
    """YAML with comments. Of two settings of one field the later one counts."""
    tree: dict[str, Any] = {}
    for setting in settings:
        *sections, field = setting.field.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[field] = setting
    comments = [f"# {line}".rstrip() for line in heading.splitlines()]
    return "\n".join([*comments, *_lines(tree, "")]) + "\n"


def _lines(tree: dict[str, Any], indent: str) -> list[str]:
    lines = []
    ordered = sorted(tree.items(), key=lambda item: isinstance(item[1], dict))  # a section's own fields come first
    for name, part in ordered:
        if isinstance(part, dict):
            lines += [f"{indent}{name}:", *_lines(part, indent + "  ")]
        else:
            value = yaml.safe_dump(part.value, default_flow_style=True, width=10_000, allow_unicode=True)
            lines.append(f"{indent}{name}: {value.removesuffix(chr(10) + '...' + chr(10)).strip()} # {part.reason}")
    return lines
