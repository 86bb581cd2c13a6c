"""Logs of one JSON object per line. Every line carries its own seal: one that is cut or changed is reported and left
out, and stops neither a report nor a training that resumes."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field, with_config
from typing_extensions import TypedDict

from common.errors import UserError
from common.files import content_key, open_own
from common.sealed import KEY, OPEN, checked, parse_json, read_bytes

Count = Annotated[int, Field(ge=0, le=10**15)]


@with_config(OPEN)
class LogLine(TypedDict):
    """Fields that we read from a line of `metrics.jsonl` or `events.jsonl`; other fields are allowed."""

    samples: Count
    step: NotRequired[Count]
    loss: NotRequired[float | None]  # null: not finite
    samples_per_second: NotRequired[Annotated[float, Field(ge=0)] | None]


def log_line(values: Any) -> str:
    return json.dumps({**values, KEY: content_key(values)}) + "\n"


def append_line(path: Path, values: Any) -> None:
    """Appends a line, on a new line even after one that a kill cut off. Raises UserError for a symbolic link."""
    log = open_own(path, os.O_APPEND)
    try:
        size = os.fstat(log).st_size
        begun = size > 0 and os.pread(log, 1, size - 1) != b"\n"
        os.write(log, ("\n" * begun + log_line(values)).encode())
    finally:
        os.close(log)


def read_log(path: Path, form: Any = LogLine) -> list[Any]:
    """Returns the valid lines; warns about invalid ones. An empty list if the file is missing.

    A last line without its end is perhaps still being written: it is left out without a warning.
    """
    if not path.exists():
        return []
    lines, faults = [], []
    for number, line in enumerate(read_bytes(path).split(b"\n")[:-1], 1):
        try:
            lines.append(_unsealed(line, f"{path}: line {number}", form))
        except UserError as fault:
            faults.append(str(fault))
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        print(f"warning: {faults[0]}{more}", file=sys.stderr, flush=True)
    return lines


def _unsealed(line: bytes, where: str, form: Any) -> Any:
    """A line's value. A line without a seal, from another program, is accepted."""
    value = parse_json(line, where, "left out")
    if isinstance(value, dict) and KEY in value and value.pop(KEY) != content_key(value):
        raise UserError(f"{where}: changed after it was written; left out")
    checked(value, where, form, "left out")
    return value
