"""Sealed JSON as somebody leaves it who changes it and seals it anew; a file as a flipped bit leaves it."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.files import content_key

# Of no field's type, form or range, or of most fields'.
WRONG: tuple[Any, ...] = (
    *(None, True, -1, 0, 10**6, 2**70, 0.5, -1e300, 1e308, float("nan"), float("inf")),
    *("", "../x", "a\nb", "\ud800", "9" * 5000, [], [[]], [-1, "x"], [0.5] * 9, {}, {"a": {"b": []}}),
)


def resealed(path: Path, change: Callable[[Any], Any]) -> None:
    """Writes the changed content of a sealed file under its own new seal; `change` may work in place."""
    value = json.loads(path.read_bytes())
    value.pop("content_key", None)
    value = change(value) or value
    key = {"content_key": content_key(value)} if isinstance(value, dict) else {}
    path.write_text(json.dumps({**value, **key} if isinstance(value, dict) else value))


def edits(value: Any, random: np.random.Generator, count: int, wrong: Sequence[Any] = WRONG) -> Iterator[Any]:
    """`count` copies of a JSON-able value, each with one field, at any depth, taken away, added or one of `wrong`."""
    for _ in range(count):
        copy = json.loads(json.dumps(value))
        holder, name = _places(copy)[random.integers(len(_places(copy)))]
        match random.integers(6):
            case 0 if isinstance(holder, dict):
                del holder[name]
            case 1 if isinstance(holder, dict):
                holder["another"] = wrong[random.integers(len(wrong))]
            case 2 if isinstance(holder, list):
                holder.append(wrong[random.integers(len(wrong))])
            case _:
                holder[name] = wrong[random.integers(len(wrong))]
        yield copy


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(holder, name or position) of every field below a value."""
    if not isinstance(value, dict | list):
        return []
    named = list(value.items() if isinstance(value, dict) else enumerate(value))
    return [(value, name) for name, _ in named] + [place for _, inner in named for place in _places(inner)]


def flips(path: Path, random: np.random.Generator, count: int) -> Iterator[int]:
    """Flips one bit of a file at a time, bit 7 of a byte every second time, and yields it; whole again at the end."""
    whole = path.read_bytes()
    try:
        for number in range(count):
            bit = 8 * int(random.integers(len(whole))) + (7 if number % 2 else int(random.integers(7)))
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            yield bit
    finally:
        path.write_bytes(whole)
