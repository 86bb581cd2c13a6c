"""Edits of a JSON value as somebody hostile, or a careless hand, would make them: edit i is a function of i alone."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np

Path_ = tuple[str | int, ...]

MISSING = object()


def values(victim: str) -> list[Any]:
    """What takes a field's place: other types, extremes, and paths that lead to `victim`."""
    nested: Any = 1
    for _ in range(50):
        nested = [nested]
    return [
        *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, -(10**30), 0.5, 1e308, float("nan"), float("inf")),
        *("", "x", "../../x", victim, f"../{victim}", "~", "/dev/null", "a\0b", "\x1b[2J", "\ud800", "9" * 5000),
        *([], {}, [[]], [1, 2], {"a": 1}, nested, MISSING),
    ]


def edited(value: Any, number: int, victim: str) -> tuple[str, Any]:
    """A copy of `value` with one field changed, and what was changed."""
    random = np.random.default_rng(number)
    found = copy.deepcopy(value)
    paths = list(_paths(value))
    path = paths[random.integers(len(paths))]
    parent = found
    for part in path[:-1]:
        parent = parent[part]
    kind = random.integers(12)
    if kind == 0 and isinstance(parent, list):
        parent.insert(path[-1], copy.deepcopy(parent[path[-1]]))
        return f"{path} twice", found
    if kind == 1 and isinstance(parent, dict):
        parent[f"{path[-1]}x"] = 1
        return f"a field beside {path}", found
    choices = values(victim)
    replacement = choices[random.integers(len(choices))]
    if replacement is MISSING:
        del parent[path[-1]]
        return f"{path} gone", found
    parent[path[-1]] = replacement
    return f"{path} = {str(replacement)[:60]!r}", found


def _paths(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Of every field, at any depth."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from _paths(item, (*path, key))
