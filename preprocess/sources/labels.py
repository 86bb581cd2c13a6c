"""Finds the labels of a data set: class indices or names in the fields of its samples."""

import re
from array import array
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from preprocess.sources.entries import MAX_CLASSES, MAX_NAME

NONE = "none"  # data.label_field: all images are one class, whatever else a sample holds
FIELDS = re.compile(  # in lower case, without underscores and dashes
    r"(class|label)(id|idx|index|name|label|text)?|cls(id)?|category(id|name)?|(fine|coarse)label|labels|targets?"
)
REMEDY = f"set data.label_field to the one that labels the images, or to {NONE} for one class"

Value = int | str | None


class Labels(NamedTuple):
    """Each sample's class, and the classes' names if the data set has them."""

    indices: NDArray[np.int64]  # (N,)
    names: list[str] | None
    field: str  # the chosen field
    by_name: bool  # whether it holds names, which are numbered in sorted order

    def class_names(self, listed: list[str] | None, path: object, field: str) -> list[str]:
        """Names of all classes; `listed`: the data set's own list, if it has one.

        Raises UserError if that list is too short, or has a name above MAX_NAME characters.
        """
        largest = int(self.indices.max())
        names = (None if self.by_name else listed) or self.names or list(map(str, range(largest + 1)))
        if largest >= len(names):
            raise UserError(f"{field}: {path} has the label {largest} ({self.field}) and {len(names)} class names")
        if (longest := max(map(len, names))) > MAX_NAME:
            raise UserError(
                f"{field}: {path} has a class name of {longest:,} characters; at most {MAX_NAME:,} are read"
            )
        return names


class Candidates:
    """Collects the values of all fields that may be the label, sample by sample, then chooses one field.

    `wanted` is the recipe's `data.label_field`: a name, "none", or None to detect it.
    """

    def __init__(self, path: object, field: str, wanted: str | None) -> None:
        self.path, self.field, self.wanted = path, field, wanted
        self._columns: dict[str, Column] = {}
        self._count = 0

    def among(self, names: Collection[str]) -> list[str]:
        """The fields of a sample that may be its label; for `json:meta.label` the last part counts."""
        if self.wanted is not None:
            return [name for name in names if name == self.wanted != NONE]
        return [
            name for name in names if FIELDS.fullmatch(_plain(name)) or (_is_y(name) and f"{name[:-1]}x" not in names)
        ]

    def add(self, values: Mapping[str, Value]) -> None:
        """Adds a sample's candidates; missing ones can be omitted."""
        for name, value in values.items():
            self._columns.setdefault(name, Column()).put(self._count, value)
        self._count += 1

    def decide(self, name_of: Callable[[int], str]) -> Labels | None:
        """The labels; None if no sample has one. `name_of` names a sample for errors.

        Raises UserError if only some samples are labelled, if values are no classes, or if fields disagree.
        """
        for name, column in self._columns.items():
            self._check(name, column, name_of)
        names = list(self._columns)
        numbers = [name for name in names if self._columns[name].is_numeric]
        if not names:
            return None
        chosen = (numbers or names)[0]
        for other in names:
            self._check_agreement(chosen, other, name_of)
        column = self._columns[chosen]
        if not numbers:
            texts = sorted(map(str, column.values))
            order = {text: index for index, text in enumerate(texts)}
            return Labels(column.spread(lambda value: order[str(value)]), texts, chosen, by_name=True)
        indices = column.spread(int)
        words = next((self._columns[name] for name in names if name not in numbers), None)
        return Labels(indices, _names(column, words) if words else None, chosen, by_name=False)

    def _check(self, name: str, column: "Column", name_of: Callable[[int], str]) -> None:
        missing = self._count - column.count
        if missing:
            raise UserError(
                f"{self.field}: {self.path} has labels ({name}) for {column.count:,} of {self._count:,} images, not "
                f"for {name_of(column.first_missing(self._count))}; label all of them or none, or {REMEDY}"
            )
        if len({isinstance(value, str) for value in column.values}) > 1:
            raise UserError(f"{self.field}: {self.path} has both numbers and names in {name}; {REMEDY}")
        strange = next((v for v in column.values if isinstance(v, int) and not 0 <= v < MAX_CLASSES), None)
        if strange is not None:
            raise UserError(
                f"{self.field}: {name_of(column.place(strange))} has the label {strange} ({name}), no class index; "
                f"name a labelled split, or {REMEDY}"
            )

    def _check_agreement(self, name: str, other: str, name_of: Callable[[int], str]) -> None:
        one, two = self._columns[name], self._columns[other]
        place = _disagreement(one, two)
        if place is not None:
            values = f"{one.value(place)!r} ({name}) and {two.value(place)!r} ({other})"
            raise UserError(
                f"{self.field}: {self.path} has several labels that do not agree, as {values} at {name_of(place)}; "
                f"{REMEDY}"
            )


class Column:
    """A candidate's values, in about 8 bytes per sample."""

    def __init__(self) -> None:
        self.values: dict[int | str, int] = {}  # each value's number
        self.ids = array("q")  # of each sample: the number of its value, -1 without one
        self.count = 0

    @property
    def is_numeric(self) -> bool:
        return all(isinstance(value, int) for value in self.values)

    def put(self, position: int, value: Value) -> None:
        self.ids.extend([-1] * (position - len(self.ids)))
        self.ids.append(-1 if value is None else self.values.setdefault(value, len(self.values)))
        self.count += value is not None

    def spread(self, number: Callable[[int | str], int]) -> NDArray[np.int64]:
        """(N,): `number` of each sample's value."""
        return np.array([number(value) for value in self.values], np.int64)[np.array(self.ids)]

    def value(self, place: int) -> int | str:
        return list(self.values)[self.ids[place]]

    def place(self, value: int | str) -> int:
        return self.ids.index(self.values[value])

    def first_missing(self, count: int) -> int:
        return self.ids.index(-1) if -1 in self.ids else min(len(self.ids), count - 1)


@lru_cache(1024)
def _plain(name: str) -> str:
    last = re.split("[:.]", name.lower().removesuffix(".txt"))[-1]
    return last.replace("_", "").replace("-", "")


def _is_y(name: str) -> bool:
    """Whether a field is `y`, scikit-learn's name for labels; beside an `x` it is a coordinate."""
    return name.rpartition(":")[2] == "y"


def as_label(value: object) -> Value:
    """A class index or name from a file's value. Raises ValueError for anything else."""
    if isinstance(value, bool | int | None):
        return None if value is None else int(value)
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:50]!r}, which is no class index and no name")
    text = value.strip()
    if re.fullmatch(r"-?\d{1,18}", text, re.ASCII):
        return int(text)
    if not text.isprintable() or not text or len(text) > 200 or re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", text):
        raise ValueError(f"{text[:50]!r}, which is no class index and no name")
    return text


def _disagreement(one: Column, two: Column) -> int | None:
    """The first sample where two columns disagree. Numbers must be equal; names must correspond one to one."""
    if one.is_numeric and two.is_numeric:
        differ = one.spread(int) != two.spread(int)
        return int(np.argmax(differ)) if differ.any() else None
    there: dict[int, int] = {}
    back: dict[int, int] = {}
    for place, (a, b) in enumerate(zip(one.ids, two.ids, strict=True)):
        if there.setdefault(a, b) != b or back.setdefault(b, a) != a:
            return place
    return None


def _names(numbers: Column, words: Column) -> list[str]:
    """The names beside the numbers; a class without samples is named by its number."""
    known = dict(zip(numbers.ids, words.ids, strict=True))
    texts = list(words.values)
    named = {int(value): str(texts[known[number]]) for value, number in numbers.values.items()}
    return [named.get(index, str(index)) for index in range(max(named) + 1)]
