"""`stages.json` in a run folder: how long each stage took the last time, for the report."""

import sys
from typing import Annotated

from pydantic import Field, with_config
from typing_extensions import TypedDict

from common.errors import UserError
from common.run_folder import RunFolder
from common.sealed import STRICT, read_sealed, write_sealed

ORDER = ("compose", "autoencoder", "encode", "train", "sample", "evaluate", "report")


@with_config(STRICT)
class TimesForm(TypedDict):
    """Seconds by stage."""

    seconds: dict[str, Annotated[float, Field(ge=0)]]


def write_time(folder: RunFolder, stage: str, seconds: float) -> None:
    """Into the run folder. What cannot be written is a warning and fails no stage, whose own work is done."""
    times = read_times(folder) | {stage: seconds}
    try:
        write_sealed(folder.times, {"seconds": times})
    except UserError as fault:
        print(f"warning: {fault}", file=sys.stderr, flush=True)


def read_times(folder: RunFolder) -> dict[str, float]:
    """Seconds by stage, in the order of the stages; none, with a warning, where the file is damaged."""
    path = folder.times
    if not path.exists():
        return {}
    try:
        seconds = read_sealed(path, TimesForm, "the times of earlier stages are lost")["seconds"]
    except UserError as fault:
        print(f"warning: {fault}", file=sys.stderr, flush=True)
        return {}
    return {stage: seconds[stage] for stage in ORDER if stage in seconds}
