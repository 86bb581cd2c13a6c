"""The stages of a run, in order."""

from common.errors import UserError
from common.recipe import Recipe
from common.stage import Stage
from pipeline.evaluation import stage as evaluation
from pipeline.reporting import stage as reporting
from pipeline.sampling import stage as sampling
from pipeline.training import stage as training
from preprocess.autoencoder import stage as autoencoder
from preprocess.demo import stage as demo
from preprocess.encoding import stage as encoding

ROOMS = (demo, autoencoder, encoding, training, sampling, evaluation, reporting)
STAGES: tuple[Stage, ...] = tuple(room.STAGE for room in ROOMS)


def select(recipe: Recipe, names: str | None) -> list[Stage]:
    """The stages that the recipe wants: all, or those of a comma-separated list. UserError names an unknown one."""
    wanted = [stage for stage in STAGES if stage.wanted(recipe)]
    if names is None:
        return wanted
    known = [stage.name for stage in wanted]
    for name in names.split(","):
        if name not in known:
            raise UserError(f"--stages: found {name!r}; allowed, separated by commas: {', '.join(known)}")
    return [stage for stage in wanted if stage.name in names.split(",")]
