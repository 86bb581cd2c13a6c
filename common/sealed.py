"""JSON files with a seal, a key of their content, whose types and ranges are checked when they are read.

A seal detects damage and edits by hand. It is no signature, since anybody can compute it; so every reader also names
the form it expects (`Form`, a TypedDict), and anything else is refused in one line.
"""

import json
import reprlib
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from common.errors import UserError, errors_as, one_line
from common.files import content_key, write_json

Form = TypeVar("Form")

KEY = "content_key"
REMEDY = "delete it and make it again"
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)  # for `pydantic.with_config` of a TypedDict
OPEN = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)  # allows fields that are not read


def parse_json(data: bytes | str, where: str | Path, remedy: str = REMEDY) -> Any:
    """The value of a JSON text from `where`. Raises UserError for anything else."""
    with errors_as(UserError, f"{where}: not readable as JSON; {remedy}"):
        return json.loads(data if isinstance(data, str) else data.decode("utf-8"))


def read_bytes(path: str | Path) -> bytes:
    """A file's bytes. Raises UserError if it is missing or unreadable."""
    try:
        return Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def write_sealed(path: str | Path, value: Any) -> None:
    """Writes a JSON-able dict with its seal, atomically."""
    write_json(path, {**value, KEY: content_key(value)})


def read_sealed(path: str | Path, form: type[Form], remedy: str = REMEDY) -> Form:
    """A sealed file's content. Raises UserError if it is missing, changed since it was sealed, or of another form."""
    return unseal(read_bytes(path), path, form, remedy)


def unseal(data: bytes | str, where: str | Path, form: type[Form], remedy: str = REMEDY) -> Form:
    """As `read_sealed`, from the file's bytes; errors name `where`."""
    value = parse_json(data, where, remedy)
    with errors_as(UserError, f"{where}: not readable as JSON; {remedy}"):  # too deeply nested for json.dumps
        intact = isinstance(value, dict) and value.pop(KEY, None) == content_key(value)
    if not intact:
        raise UserError(f"{where}: changed after it was written; {remedy}")
    return checked(value, where, form, remedy)


def checked(value: Any, where: str | Path, form: type[Form], remedy: str = REMEDY) -> Form:
    """`value`, if it has this form. Raises UserError naming the first wrong field."""
    try:
        return _adapter(form).validate_python(value)  # type: ignore[arg-type]  # a class is hashable
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        name = ".".join(map(str, fault["loc"])) or "content"
        reason = one_line(f"{name}: {fault['msg']}; found {reprlib.repr(fault['input'])}", 300)
        raise UserError(f"{where}: {reason}; {remedy}") from None


@cache
def _adapter(form: Any) -> TypeAdapter[Any]:
    return TypeAdapter(form)
