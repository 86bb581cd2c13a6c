"""From images and a machine to a recipe: looks, measures, chooses, and says what the run will take."""

import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from common.errors import UserError, printable
from common.files import atomic_write
from common.loading import override_field
from common.ranks import share_cores
from common.recipe import VAE, Recipe
from fpdm.latents import draw_latents
from pipeline.planning.disk import disk
from pipeline.planning.estimate import Speeds, measured
from pipeline.planning.machine import Machine, this_machine
from pipeline.planning.page import disk_line, duration
from pipeline.proposal.choose import (
    DEMO_VAE,
    WIDER_COST,
    autoencoder_settings,
    complete,
    counted,
    expected_times,
    first_settings,
    fitting_epochs,
    lengths,
    planned,
    run_name,
    with_classes,
    without_autoencoder,
)
from pipeline.proposal.look import Look, look
from pipeline.proposal.recipe_text import Setting, recipe_text
from pipeline.training.warnings import MOST_EPOCHS
from preprocess.autoencoder import training as autoencoder
from preprocess.autoencoder.images import Images, load_images
from preprocess.autoencoder.loop import BATCH_SIZE, run
from preprocess.encoding.encoder import Encoder

FEW = 20  # images of a class, below which it is said
SHOWN = 20  # of many files
MEASURED = 64  # images on which an autoencoder is measured
WARM_UP, STEPS = 1, 4
MEASURED_STAGES = ("encode", "train", "sample", "evaluate")
TRAINING_SECONDS = 12.0  # of training, measured
OF_NETWORK = ("train", "sample")  # stages whose speed is the network's
# Where the user chose one of these, the width stays the demo's.
OF_WIDTH = {"model.size", "model.hidden_size", "train.epochs"}
OF_WIDTH |= {"train.total_samples", "train.max_hours", "train.max_pflops"}

HEADING = """Written by pipeline/init.py for {images}, with what differs from the defaults.

  {command}

Expected on {machine}: {time}.
docs/recipe.md explains every field. Change what you like; `--dry-run` checks it."""


def propose(images: str, out: Path, budget: float, overrides: Sequence[str]) -> Recipe:
    """Writes the recipe to `out`. Raises UserError where the images cannot be read, or no recipe fits them."""
    own = [_own(override) for override in overrides]
    asked = complete([Setting("name", "init", ""), Setting("data.images", images, ""), *own], unfit=True)
    found, machine = look(asked.data), this_machine(Path.cwd())
    show_images(found)
    print(f"machine: {machine}\nmeasuring it, for half a minute and more ...", flush=True)
    settings, speeds = choose(found, machine, budget, own)
    recipe = complete(settings)
    expected = expected_times(recipe, found, speeds)
    command = shlex.join(["python", "pipeline/run.py", "--config", str(out)])
    heading = HEADING.format(images=images, command=command, machine=machine, time=duration(sum(expected.values())))
    with atomic_write(out) as file:
        file.write_text(recipe_text(settings, heading), encoding="utf-8")
    show_costs(expected, disk(planned(recipe, found), found.usable), machine, budget)
    print(f"recipe: {out}\nnext: {command}")
    return recipe


def choose(found: Look, machine: Machine, budget: float, own: Sequence[Setting]) -> tuple[list[Setting], Speeds]:
    """All settings, `own` last, and the speeds that they were chosen by."""
    name = next((str(setting.value) for setting in own if setting.field == "name"), run_name(found.data.images))
    theirs = [setting.value for setting in own if setting.field == "vae.path"]
    given = without_autoencoder() if theirs == [None] else []
    autoencoder = given if theirs else autoencoder_settings(name, None, None, budget)
    first = [*first_settings(name, found, machine, autoencoder, own), *own]
    recipe = with_classes(complete(first), found)
    images = load_images(recipe, at_most=MEASURED)
    rate = _autoencoder_rate(recipe, images) if recipe.vae.training else 1.0
    trained = given if theirs else autoencoder_settings(name, _psnr_of_demo(images), rate, budget)
    chosen = {setting.field for setting in own}
    settings = [*first_settings(name, found, machine, trained, own), *own]
    recipe = with_classes(complete(settings), found)
    speeds = measured(planned(recipe, found), MEASURED_STAGES, TRAINING_SECONDS)._replace(autoencoder=rate)
    room = fitting_epochs(recipe, found, speeds, budget) >= MOST_EPOCHS * WIDER_COST
    if room and not machine.gpus and not chosen & OF_WIDTH:
        wider = [*first_settings(name, found, machine, trained, own, wider=True), *own]
        its_recipe = with_classes(complete(wider), found)
        its = measured(planned(its_recipe, found), OF_NETWORK, TRAINING_SECONDS)
        its_speeds = speeds._replace(training=its.training, memory=its.memory, sampling=its.sampling)
        if fitting_epochs(its_recipe, found, its_speeds, budget) >= MOST_EPOCHS:
            settings, recipe, speeds = wider, its_recipe, its_speeds
    counted_in_samples = lengths(recipe, found, speeds, budget)
    if "train.total_samples" in chosen:
        chosen.add("train.epochs")
    return [*settings, *(one for one in counted_in_samples if one.field not in chosen)], speeds


def _own(override: str) -> Setting:
    """A field that the user chose on the command line."""
    field, separator, _ = override.partition("=")
    if not separator:
        raise UserError(f"{override!r}: not a field; write section.field=value, such as data.resolution=32")
    value: Any = {}
    override_field(value, override)
    for part in field.split("."):
        value = value[part]
    return Setting(field, value, "as you chose")


def _psnr_of_demo(images: Images) -> float:
    """Of the demo's autoencoder on these images."""
    demo = Encoder(VAE(path=str(DEMO_VAE), downsampling=4))
    return _psnr(demo, torch.cat([images.held_out, images.statistics])[:MEASURED])


def _psnr(encoder: Encoder, images: torch.Tensor) -> float:
    """Of images (B, 3, H, W) in [-1, 1] after the autoencoder, decoded from the posterior's mean, in dB."""
    moments = encoder.encode(images)
    zeros, identity = torch.zeros_like(moments[:, : moments.shape[1] // 2]), encoder.identity
    latents = draw_latents(moments, zeros, identity.scaling_factor, identity.shift_factor)
    return autoencoder.psnr(encoder.decode(latents).cpu(), images).mean().item()


def _autoencoder_rate(recipe: Recipe, images: Images) -> float:
    """Images a second of its training, with all cores."""
    share_cores()
    assert recipe.vae.training is not None
    trial = replace(recipe.vae.training, images=BATCH_SIZE * (WARM_UP + STEPS))
    recipe = replace(recipe, vae=replace(recipe.vae, training=trial))
    steps = run(autoencoder.whole(recipe, lambda step: images.batch(step, BATCH_SIZE)), quiet=True)
    for _ in range(WARM_UP):
        next(steps)
    start = time.monotonic()
    for _ in range(STEPS):
        next(steps)
    return STEPS * BATCH_SIZE / (time.monotonic() - start)


def show_images(found: Look) -> None:
    """Classes, sizes, and every file that is not used, with its reason."""
    names = [f"{printable(name)} {count:,}" for name, count in found.per_class.items()]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    print(f"images: {found.usable:,} usable in {counted(len(names), 'class')}: {', '.join(names[:SHOWN])}{more}")
    if len(found.seen) < found.found:
        print(f"  {len(found.seen):,} of {found.found:,} were looked at, evenly at random")
    if (few := min(found.per_class.values())) < FEW and len(names) > 1:
        print(f"  note: the smallest class has {few}, {few / found.usable:.1%} of what the network sees")
    low, high = found.sizes.min(axis=0), found.sizes.max(axis=0)
    middle = " x ".join(f"{median(column):.0f}" for column in found.sizes.T.tolist())
    print(f"sizes: {low[0]} x {low[1]} to {high[0]} x {high[1]} pixels, half of them above {middle}")
    for title, files in (("unusable", found.unusable), ("of an unsupported kind", found.unsupported)):
        if files:
            print(f"{title}: {len(files)}")
        for reason in dict.fromkeys(reason for _, reason in files):
            same = [name for name, why in files if why == reason]
            for name in same[:SHOWN]:
                print(f"  {printable(name)}: {printable(reason)}")
            if len(same) > SHOWN:
                print(f"  and {len(same) - SHOWN} more for that reason")
    for reason, count in found.others.most_common(SHOWN):
        print(f"left out: {count:,} files ({printable(reason)})")


def show_costs(seconds: dict[str, float], sizes: dict[str, float], machine: Machine, budget: float) -> None:
    """Time of each stage and bytes on disk by kind; warns where the disk is too small or the time too short."""
    parts = ", ".join(f"{name} {duration(spent)}" for name, spent in seconds.items())
    print(f"expected time: {duration(sum(seconds.values()))}: {parts}\n{disk_line(sizes, machine)}")
    if sum(sizes.values()) > 1e9 * machine.free_gb:
        print(f"warning: the disk has {machine.free_gb:.2f} GB free; make room, or set runs and data.shards to another")
    if sum(seconds.values()) > 1.2 * budget:
        print(f"warning: more than --time {duration(budget)}; the least that makes sense was chosen")
