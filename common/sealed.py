"""JSON files that prove themselves: sealed by a key of their content, and checked by type, form and range when read.

A seal finds damage, and edits by hand; it is no signature: whoever can write the file can seal it. So every reader
states the form that it needs (`Form`, a TypedDict), and what has another is refused in one line.
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
OPEN = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)  # of what may hold more than is read


def parse_json(data: bytes | str, where: str | Path, remedy: str = REMEDY) -> Any:
    """The value of JSON from `where`. Raises UserError for bytes that are none, whatever they are."""
    with errors_as(UserError, f"{where}: not readable as JSON; {remedy}"):
        return json.loads(data if isinstance(data, str) else data.decode("utf-8"))


def read_bytes(path: str | Path) -> bytes:
    """A file's bytes. Raises UserError where it is missing or cannot be read."""
    try:
        return Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read_json(path: str | Path, remedy: str = REMEDY) -> Any:
    """Raises UserError where the file is missing or is no JSON."""
    return parse_json(read_bytes(path), path, remedy)


def write_sealed(path: str | Path, value: Any) -> None:
    """Writes a JSON-able dict with its seal, whole or not at all."""
    write_json(path, {**value, KEY: content_key(value)})


def read_sealed(path: str | Path, form: type[Form], remedy: str = REMEDY) -> Form:
    """Raises UserError where the file is missing, not as `write_sealed` left it, or not of this form."""
    return unseal(read_bytes(path), path, form, remedy)


def unseal(data: bytes | str, where: str | Path, form: type[Form], remedy: str = REMEDY) -> Form:
    """As `read_sealed`, from the file's bytes; `where` is what errors name."""
    value = parse_json(data, where, remedy)
    with errors_as(UserError, f"{where}: not readable as JSON; {remedy}"):  # nested too deep for its key
        whole = isinstance(value, dict) and value.pop(KEY, None) == content_key(value)
    if not whole:
        raise UserError(f"{where}: changed after it was written; {remedy}")
    return checked(value, where, form, remedy)


def checked(value: Any, where: str | Path, form: type[Form], remedy: str = REMEDY) -> Form:
    """`value` if it is of this form. Raises UserError naming the first field that is not."""
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
