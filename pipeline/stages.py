"""The stages of a run, in order, and what each asks for."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from common.files import read_json, write_json
from common.recipe import Recipe
from slurm.cluster import Resources


@dataclass(frozen=True)
class Stage:
    """One stage: the module of its `function(recipe)` and `finished(recipe)`, and whether ranks share its work."""

    name: str
    module: str
    function: str
    parallel: bool = False
    wanted: Callable[[Recipe], bool] = lambda _: True

    def finished(self, recipe: Recipe) -> bool:
        return importlib.import_module(self.module).finished(recipe)

    def resources(self, recipe: Recipe) -> Resources:
        """Parallel stages get all processes; the others one, with the cores of all."""
        launch = recipe.launch
        if self.parallel:
            return Resources(
                nodes=launch.nodes,
                processes=launch.processes,
                cpus_per_process=launch.cpus_per_process,
                gpus_per_process=launch.gpus_per_process,
                timeout_minutes=launch.timeout_minutes,
            )
        return Resources(
            cpus_per_process=launch.processes * launch.cpus_per_process,
            gpus_per_process=min(1, launch.gpus_per_process),
            timeout_minutes=launch.timeout_minutes,
        )


STAGES = (
    Stage("compose", "preprocess.demo_pictures", "compose", wanted=lambda recipe: recipe.demo is not None),
    Stage("encode", "preprocess.encode_latents", "encode"),
    Stage("train", "pipeline.trainer", "train", parallel=True),
    Stage("sample", "pipeline.samples", "sample", parallel=True),
    Stage("evaluate", "pipeline.eval_fid", "evaluate"),
    Stage("report", "pipeline.report", "report"),
)


def keep_time(recipe: Recipe, stage: Stage, seconds: float) -> None:
    """Notes in `stages.json` how long a stage took when it was last run; the report shows it."""
    path = recipe.folder / "stages.json"
    times = {entry["stage"]: entry["seconds"] for entry in read_json(path)} if path.exists() else {}
    times[stage.name] = seconds
    write_json(path, [{"stage": one.name, "seconds": times[one.name]} for one in STAGES if one.name in times])
