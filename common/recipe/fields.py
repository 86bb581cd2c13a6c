"""The kinds of values that a recipe's fields take."""

import re
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, Strict, StrictInt

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


def _is_folder(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9]{12}", value) is not None


def _name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", value):
        raise ValueError("should be at most 100 letters, digits, '.', '_' and '-', beginning with a letter or digit")
    return value


def _some(values: tuple[object, ...]) -> tuple[object, ...]:
    if not values:
        raise ValueError("is empty; name at least one value")
    return values


Count = Annotated[StrictInt, Field(ge=1)]
CountOrZero = Annotated[StrictInt, Field(ge=0)]
TwoOrMore = Annotated[StrictInt, Field(ge=2)]
# Bounds of what is counted or allocated while a recipe is read, so that a mistyped number is refused at once.
Part = Annotated[StrictInt, Field(ge=1, le=65_536)]  # width, heads or patch of a network
Timesteps = Annotated[StrictInt, Field(ge=2, le=100_000)]
Number = Annotated[float, Strict()]  # no true, and no "0.1"
Fraction = Annotated[Number, Field(ge=0, le=1)]
AboveZero = Annotated[Number, Field(gt=0, le=1)]
BelowOne = Annotated[Number, Field(ge=0, lt=1)]
Positive = Annotated[Number, Field(gt=0)]
AtLeastZero = Annotated[Number, Field(ge=0)]
Seed = Annotated[StrictInt, Field(ge=0, lt=2**32)]
Width = Annotated[Number, Field(gt=0, lt=0.28)]  # of a power-function average (fpdm.ema)
Place = Annotated[str, "path"]  # of a folder or file; `~`, `$NAME` and `${NAME}` are expanded (`slurm.paths`)
# A number of samples, or the name of its folder, which has 12 digits.
SamplesSeen = Annotated[CountOrZero, BeforeValidator(lambda value: int(value) if _is_folder(value) else value)]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._,:-]*$")]  # reaches sbatch
T = TypeVar("T")
Some = Annotated[tuple[T, ...], AfterValidator(_some)]
Name = Annotated[str, AfterValidator(_name)]
