"""What a run has cost: hours of its devices, operations, energy, and what the DiT of its size would have taken."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from common import gpus
from common.log_lines import read_log
from common.provenance import Started
from common.recipe import Launch, Recipe, Train, denoiser_config, launch_of
from common.recipe.training import OF_ITERATIONS
from common.run_folder import RunFolder
from common.stage_times import read_times
from fpdm.denoiser import count_parameters
from pipeline.sampling.plans import blocks_an_image
from pipeline.training.operations import mean_flops


def receipt(recipe: Recipe, samples_seen: int, device: str | None) -> Iterator[tuple[str, str]]:
    """Lines of a table. `samples_seen`: in training; `device`: the GPU's name as torch gives it, None of CPUs."""
    folder = RunFolder(recipe.folder)
    hours = _hours(recipe.launch, folder)
    kind = "GPU" if device else "process"
    if hours:
        parts = ", ".join(f"{stage} {spent:.2g}" for stage, spent in hours.items() if spent >= 0.001)
        yield f"{kind}-hours", f"{sum(hours.values()):.3g}: {parts}"
    if steps := _step_seconds(folder):
        yield "steps of training", f"{steps * _ranks(folder) / 3600:.3g} {kind}-hours, without starts and saves"
    flops = samples_seen * mean_flops(recipe)
    yield "training", f"{flops / 1e15:,.4g} PFLOP for {samples_seen:,} samples; recomputation is not counted"
    yield "sampling", f"{blocks_an_image(recipe):,} blocks an image"
    gpu = gpus.named(device)
    if gpu and hours:
        energy = sum(hours.values()) * gpu.watts / 1e3
        yield "energy", f"at most {energy:.3g} kWh, at the {gpu.name}'s rated power of {gpu.watts:g} W"
    elif hours:
        yield "energy", f"not known: no rated power of {device or 'this CPU'}"
    yield from _as_dit(recipe, flops, samples_seen)


def _as_dit(recipe: Recipe, flops: float, samples_seen: int) -> Iterator[tuple[str, str]]:
    """A DiT of the recipe's size on the same training samples, in the same number of steps."""
    if recipe.model.kind == "dit":
        return
    dit = as_dit(recipe)
    config = denoiser_config(dit)
    times = samples_seen * mean_flops(dit) / flops if flops else 0.0
    blocks = blocks_an_image(dit)
    yield (
        f"a DiT of {config.depth} blocks",
        f"{count_parameters(config):,} parameters instead of {count_parameters(denoiser_config(recipe)):,}; "
        f"{times:.2g} times the operations for as many training samples; {blocks:,} blocks an image in as many steps "
        f"instead of {blocks_an_image(recipe):,}",
    )


def as_dit(recipe: Recipe) -> Recipe:
    """The recipe of a DiT, without what only a fixed point has."""
    off: dict[str, Any] = {name: getattr(Train, name) for name in OF_ITERATIONS}
    train = replace(recipe.train, gradient="sjfb", **off)
    sample = replace(recipe.sample, iterate_guidance=0.0)
    return replace(recipe, model=replace(recipe.model, kind="dit"), train=train, sample=sample)


def _hours(launch: Launch, folder: RunFolder) -> dict[str, float]:
    """Of all devices of each stage's last start; one that went on after an interruption shows its last part alone."""
    return {
        stage: seconds * (_ranks(folder) if stage == "train" else _sharing(launch, stage)) / 3600
        for stage, seconds in read_times(folder).items()
    }


def _sharing(launch: Launch, stage: str) -> int:
    launch = launch_of(launch, stage)
    return launch.nodes * launch.processes if stage == "sample" and launch.jobs == 1 else 1


def _ranks(folder: RunFolder) -> int:
    """Of the last start."""
    started = [line for line in read_log(folder.provenance, Started) if line["stage"] == "train"]
    return started[-1].get("ranks", 1) if started else 1


def _step_seconds(folder: RunFolder) -> float:
    """From the log, whatever interrupted the training."""
    lines, seconds, before = read_log(folder.log), 0.0, 0
    for line in lines:
        if "step_seconds" in line and "step" in line:
            seconds += (line["step"] - before) * line["step_seconds"]
            before = line["step"]
    return seconds
