"""`jobs.json` in a run folder: the jobs that were submitted for it."""

from typing import Annotated

from pydantic import Field, with_config
from typing_extensions import TypedDict

from common.sealed import STRICT

JobNumber = Annotated[str, Field(pattern="^[0-9]{1,18}$")]


@with_config(STRICT)
class JobForm(TypedDict):
    """A job, or an array of `parts` jobs."""

    step: Annotated[str, Field(pattern="^[a-z-]{1,40}$")]
    job: JobNumber
    parts: Annotated[int, Field(ge=1)]
    after: JobNumber | None
    logs: Annotated[str, Field(pattern="^[^\\x00-\\x1f]*$")]  # folder
    recipe: str  # key of the recipe it works on
    time: Annotated[float, Field(ge=0)]


@with_config(STRICT)
class ListingForm(TypedDict):
    jobs: list[JobForm]
