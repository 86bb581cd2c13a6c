"""A stage of a run: what it would do, whether it is finished, its work, and how jobs share that."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from common.errors import NoDataYet
from common.recipe import Recipe

T = TypeVar("T")


def the_recipe(recipe: Recipe) -> Recipe:
    """`resolve` of a stage that needs nothing but the recipe."""
    return recipe


@dataclass(frozen=True)
class Input(Generic[T]):
    """Something that a stage reads. `look` raises UserError where it is missing or does not fit, on any machine that
    sees the files: a login node has neither the job's ranks nor its GPUs. It writes and downloads nothing.
    """

    look: Callable[[T], object]  # what it returns is dropped; an iterator is read to its end
    made_by: tuple[str, ...] = ()  # stages; while one of them is still to run, nobody looks


@dataclass(frozen=True, kw_only=True)
class Stage(Generic[T]):
    """One object for the command, `run.py`, its chain of SLURM jobs, and job arrays.

    Jobs import the functions that they call: these are functions or classes of a module, no lambdas.
    """

    name: str
    # The recipe with the files that it names: found, identified and hashed once, however many functions use them.
    resolve: Callable[[Recipe], T]
    # Checks this machine and says what will be done, a line each; writes nothing. `warning: ...` is printed as it is.
    plan: Callable[[T], Iterable[str]]
    finished: Callable[[T], bool]
    work: Callable[[T], None]  # keeps what is finished, and goes on from there

    ranks_share: bool = False  # `work` is one rank's share; all ranks must have come before any begins
    all_processes: bool = False  # a job has all ranks of the recipe's launch section, not one

    # Independent jobs: `part(resolved, part, parts)`, in any order and any number of times. `first` runs before all
    # parts and `merge` after them, each in a job; `fetch` before all jobs, where they are submitted.
    part: Callable[[T, int, int], None] | None = None
    first: Callable[[T], None] | None = None
    merge: Callable[[T], None] | None = None
    merge_needs_all_cores: Callable[[Recipe], bool] = lambda _recipe: False
    fetch: Callable[[Recipe], object] | None = None

    inputs: tuple[Input[T], ...] = ()
    wanted: Callable[[Recipe], bool] = lambda _recipe: True
    place: Callable[[Recipe], object] = lambda recipe: recipe.folder  # where the results lie
    # Raises UserError for what the work would refuse by the recipe and the resolved cluster alone.
    check: Callable[[Recipe, str], None] = lambda _recipe, _cluster: None

    def is_finished(self, recipe: Recipe) -> bool:
        try:
            return self.finished(self.resolve(recipe))
        except NoDataYet:  # a stage before this one makes it
            return False
