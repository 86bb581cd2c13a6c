"""One page about a run before it begins: images, steps, time, disk and memory; what is not known is said."""

from collections.abc import Iterator, Sequence

from common.errors import UserError
from common.gpus import GPUS
from common.recipe import Recipe, describe_network, launch_of
from common.stage import Stage
from pipeline.planning.disk import disk
from pipeline.planning.estimate import UTILISATION, Speeds, computed, count_images, measured, resolved, stage_times
from pipeline.planning.machine import Machine, this_machine
from pipeline.planning.memory import on_a_gpu
from pipeline.sampling.plans import blocks_an_image
from pipeline.training.identity import total_samples
from pipeline.training.operations import describe_cost, with_end

TRAINING_SECONDS = 5.0  # of training, measured
NAMES = ", ".join(GPUS)


def plan_page(recipe: Recipe, stages: Sequence[Stage], cluster: str, *, measure: bool) -> Iterator[str]:
    """A line at a time; measuring comes last. `measure`: False leaves it out, where the run would not start."""
    yield describe_network(recipe)
    images = count_images(recipe)
    try:
        recipe = with_end(resolved(recipe, images))
    except UserError:  # which the stage's own check names
        images = None
    if images is None:
        yield "images: not there; how many they are decides time and disk"
        return
    launch, samples = launch_of(recipe.launch, "train"), total_samples(recipe.train)
    ranks = launch.nodes * launch.processes
    yield f"images: {images:,} in {recipe.model.num_classes:,} classes, each seen {samples / images:,.2f} times"
    yield f"steps: {samples // recipe.train.batch_size:,} of {recipe.train.batch_size} samples, over {ranks} processes"
    yield f"training: {describe_cost(recipe)}"
    yield f"sampling: {recipe.sample.num_samples:,} images of {blocks_an_image(recipe):,} blocks"
    machine, to_do = this_machine(recipe.folder), [stage for stage in stages if not stage.is_finished(recipe)]
    yield disk_line(disk(recipe, images), machine)
    if sum(disk(recipe, images).values()) > 1e9 * machine.free_gb:
        yield "the disk is too small for all of it: make room, or set runs and data.shards to another"
    if recipe.launch.gpu:
        there = GPUS[recipe.launch.gpu].memory_gb
        yield f"memory: {on_a_gpu(recipe, ranks) / 1e9:.1f} GB of a GPU's {there:g} in training, counted"
    if finished := [stage.name for stage in stages if stage not in to_do]:
        yield f"finished: {', '.join(finished)}"
    if not to_do:
        return
    speeds, how = _speeds(recipe, [stage.name for stage in to_do], machine, cluster, measure=measure)
    if speeds.memory:
        yield f"memory: {speeds.memory / 1e9:.2f} GB in each of {launch.processes} processes of training, measured"
    yield from _times(recipe, images, speeds, to_do, cluster, how)


def _speeds(
    recipe: Recipe, stages: Sequence[str], machine: Machine, cluster: str, *, measure: bool
) -> tuple[Speeds, str]:
    """Of the stages, and how they were found."""
    launch = launch_of(recipe.launch, "train")
    if recipe.launch.gpu:
        gpu = GPUS[recipe.launch.gpu]
        used = UTILISATION[recipe.model.kind]
        return computed(recipe, gpu), f"computed for one {gpu.name} a process at {used:.0%} of its peak"
    if not measure:
        return Speeds(), "not measured, since the run would not start"
    if cluster == "slurm" or launch.nodes > 1 or (launch.gpus_per_process and not machine.gpus):
        return Speeds(), f"not known here; launch.gpu says for which GPU it is computed: {NAMES}"
    print("plan: measuring this machine, for half a minute ...", flush=True)
    return measured(recipe, stages, TRAINING_SECONDS), f"measured on {machine.devices}"


def disk_line(sizes: dict[str, float], machine: Machine) -> str:
    """`sizes`: bytes by kind."""
    parts = ", ".join(f"{kind} {gigabytes(size)}" for kind, size in sizes.items())
    return f"disk: {gigabytes(sum(sizes.values()))} GB: {parts}; {machine.free_gb:,.0f} GB free"


def _times(
    recipe: Recipe, images: int, speeds: Speeds, stages: Sequence[Stage], cluster: str, how: str
) -> Iterator[str]:
    times = stage_times(recipe, images, speeds, stages, cluster)
    known = {name: time for name, time in times.items() if time.seconds is not None}
    for name, time in times.items():
        where = f"{time.devices} process{'es' * (time.devices > 1)}, --cluster {cluster}"
        yield f"{name}: {where}" + (f": {duration(time.seconds)}" if time.seconds is not None else "")
    if not known or speeds == Speeds():
        yield f"time: {how}"
        return
    total = sum(time.seconds or 0.0 for time in known.values())
    hours = sum(time.device_hours for time in known.values())
    missing = f", without {', '.join(name for name in times if name not in known)}" if len(known) < len(times) else ""
    device = "GPU" if recipe.launch.gpu or recipe.launch.gpus_per_process else "process"
    yield f"time: {duration(total)}{missing}; {hours:.2f} {device}-hours; {how}"


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g}"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
