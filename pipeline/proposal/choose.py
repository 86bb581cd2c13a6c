"""Settings that suit some images on a machine, each with its reason. They start from recipes/demo.yaml's."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common.efficientnet import PUBLISHED
from common.loading import load_recipe, parse_recipe
from common.recipe import Recipe
from pipeline.planning.estimate import START_SECONDS, Speeds, stage_times
from pipeline.planning.machine import ROOT, Machine
from pipeline.planning.page import duration
from pipeline.proposal.look import Look
from pipeline.proposal.recipe_text import Setting, recipe_text
from pipeline.stages import select
from pipeline.training.warnings import MOST_EPOCHS
from preprocess.autoencoder.stage import DECODER_COST, TEACHER

DEMO = ROOT / "recipes/demo.yaml"
DEMO_VAE = ROOT / "assets/vae-demo"
GOOD_PSNR = 28.0  # dB, from which an autoencoder is used as it is
ON_WHITE = 0.5  # share of images with white corners from which nothing is cut off
NEARLY_SQUARE = 1.1
LINE_SECONDS, GRIDS, CHECKPOINT_SECONDS = 20, 8, 600
AUTOENCODER_SHARE = 0.2  # of the time
MOST_COMPARED = 2048
WIDER_COST = 3.5  # times the seconds a sample, for a network twice as wide on CPUs

# Fields of the demo's recipe that are taken over, and why.
FROM_DEMO = {
    "model.size": "none of DiT's sizes, which are for ImageNet",
    "model.hidden_size": "a network that learns on CPUs",
    "model.num_heads": "as the demo's",
    "model.pre_post_timestep_conditioning": "this and the next four learned faster in the demo (docs/speedrun.md)",
    "model.qk_norm": "bounds attention's logits",
    "model.rope": "positions in attention",
    "model.value_residual": "attention's values reach later layers",
    "model.injection": "a quarter fewer products an iteration",
    "objective.prediction": "learned faster in the demo",
    "objective.loss_weight": "goes with clean predictions",
    "objective.learned_variance": "multistep has no use for it",
    "train.max_no_grad_iterations": "few iterations: cheaper; the paper's own table finds 3 best for short training",
    "train.max_grad_iterations": "as above",
    "train.zero_stage": "fastest for a network of this size",
    "train.latents": "easier to learn where the posterior is wide",
    "train.timesteps.kind": "the middle of the noise is seen more often",
    "train.timesteps.stratified": "less noise in the loss",
    "train.optimizer.betas": "a short memory, for a short training",
    "train.optimizer.learning_rate_decay": "falls to 0 at the end",
    "train.ema.reference_batch": "the batch that decays are stated for",
    "sample.sampler": "good in few steps",
    "sample.iterations": "of the fixed point, a step",
    "sample.start_extrapolation": "each step starts where the last two point to; costs nothing",
    "sample.eta": "noise in the steps: at twice the demo's width more images were like the real ones",
    "sample.batch_size": "at once",
    "sample.chunk_samples": "samples in a file",
    "evaluate.batch_size": "at once",
}


def first_settings(
    name: str,
    found: Look,
    machine: Machine,
    autoencoder: Sequence[Setting],
    own: Sequence[Setting],
    *,
    wider: bool = False,
) -> list[Setting]:
    """All but the lengths, which need the machine's speeds. `own`: what the user chose, which others follow.

    wider: a network twice as wide as the demo's, where there is no GPU.
    """
    chosen = {setting.field: setting.value for setting in own}
    resolution, classes = chosen.get("data.resolution", _resolution(found, machine)), len(found.class_names)
    processes = 2 ** int(math.log2(len(machine.gpus) or min(machine.cores, 8)))
    pixels = "vae.path" in chosen and chosen["vae.path"] is None
    patch = 4 if pixels or resolution >= 64 else 2
    images = found.data.images.replace("$", "$$")  # which paths in recipes otherwise expand
    count = f"{found.usable:,} usable images in {counted(classes, 'class')}"
    demo = load_recipe(DEMO)
    its_width = demo.model.hidden_size or 0
    width = 384 if machine.gpus else 2 * its_width if wider else its_width
    sized = "model.size" in chosen  # by one of DiT's sizes, which says width and heads
    narrow = not sized and chosen.get("model.hidden_size", width) <= its_width
    settings = [
        Setting("name", name, f"results go to runs/{name}"),
        Setting("data.images", images, count),
        Setting("data.shards", f"data/{name}/shards", "the latents"),
        Setting("data.crop", *crop(found)),
        Setting("data.resolution", resolution, _why_resolution(found, machine)),
        Setting("data.max_rejected", *max_rejected(len(found.unusable), len(found.seen), found.found)),
        *autoencoder,
        Setting("model.patch_size", patch, f"{(resolution // (patch * (1 if pixels else 4))) ** 2} tokens an image"),
        *_from_demo(demo, None if sized else width, machine),
        Setting("train.batch_size", 128 if machine.gpus else 64, "divided among the processes"),
        Setting(
            "train.optimizer.learning_rate",
            4e-3 if narrow else 2e-3,
            "lower than the demo's: rates were tried on it alone",
        ),
        Setting("sample.num_steps", 12 if classes > 1 else 24, "as many blocks an image with guidance as without"),
        Setting("sample.guidance_scale", *((2.0, "towards the class") if classes > 1 else (1.0, "there is one class"))),
        Setting("launch.processes", processes, f"of {machine}"),
    ]
    if found.data.source != "folder":
        settings.append(Setting("data.source", found.data.source, "by the files' names"))
    if machine.gpus:
        settings.append(Setting("launch.gpus_per_process", 1, "one process a GPU"))
    return settings + _evaluation(found)


def lengths(recipe: Recipe, found: Look, speeds: Speeds, budget: float) -> list[Setting]:
    """How long to train, and what is counted in samples, for `budget` seconds in all."""
    batch, images, rate = recipe.train.batch_size, found.usable, _rate(speeds)
    fitting = fitting_epochs(recipe, found, speeds, budget)
    epochs = recipe.train.epochs or max(1, min(round(fitting), MOST_EPOCHS))
    total = recipe.train.total_samples or epochs * images
    limit = f"; {fitting:,.0f} would fit, and above {MOST_EPOCHS:,} it learns the images by heart"
    reason = f"{total:,} samples at {rate:.0f} a second, {duration(total / rate)}"
    decay = min(max(1 - 10 * recipe.train.ema.reference_batch / total, 0.99), 0.9999)
    return [
        Setting("train.epochs", epochs, reason + (limit if fitting > MOST_EPOCHS else "")),
        Setting("train.optimizer.warmup_samples", _steps(min(3200, total / 10), batch), "at most a tenth of it"),
        Setting("train.ema.decays", [round(decay, 4)], "averages over about a tenth of the steps"),
        Setting(
            "train.checkpoint.every_samples",
            _steps(min(total / 4, CHECKPOINT_SECONDS * rate), batch),
            "the most that a kill costs: ten minutes or a quarter",
        ),
        Setting(
            "train.log.every_samples",
            _steps(min(total / 10, LINE_SECONDS * rate), batch),
            f"a line every {LINE_SECONDS} seconds",
        ),
        Setting(
            "train.previews.grid_every_samples",
            _steps(total / GRIDS, batch),
            f"{GRIDS} grids, in runs/{recipe.name}/grids",
        ),
    ]


def fitting_epochs(recipe: Recipe, found: Look, speeds: Speeds, budget: float) -> float:
    """The epochs for which there is time beside the other stages."""
    others = sum(seconds for name, seconds in expected_times(recipe, found, speeds).items() if name != "train")
    return max(budget - others - START_SECONDS, 0.1 * budget) * _rate(speeds) / found.usable


def _rate(speeds: Speeds) -> float:
    return speeds.training or 1.0


def autoencoder_settings(name: str, psnr: float | None, rate: float | None, budget: float) -> list[Setting]:
    """The demo's autoencoder where it does for these images; else it is trained further on them.

    `psnr`: what the demo's gives on these images, None where it was not measured. `rate`: images a second in training.
    """
    shown = "./" + str(DEMO_VAE.relative_to(Path.cwd())) if DEMO_VAE.is_relative_to(Path.cwd()) else str(DEMO_VAE)
    network = Setting("vae.downsampling", 4, "of the demo's autoencoder, and those like it")
    if psnr is not None and psnr >= GOOD_PSNR:
        return [Setting("vae.path", shown, f"returns these images with a PSNR of {psnr:.1f} dB: good enough"), network]
    # A third of the time for its decoder alone: what the network draws is as sharp as that.
    counted = min(max(AUTOENCODER_SHARE * budget * (rate or 10), 2_000), 48_000)
    images, decoder_images = (8 * round(share * counted / 8) for share in (2 / 3, 1 / 3 / DECODER_COST))
    further = [Setting("vae.training.decoder_images", decoder_images, "then its decoder alone: sharp details")]
    if PUBLISHED[TEACHER].path is None:
        further = []
    measured = f"alone it returns these images with {psnr:.1f} dB" if psnr is not None else "not measured yet"
    minutes = f", {duration(images / rate)} at {rate:.0f} a second" if rate else ""
    return [
        Setting("vae.path", f"data/{name}/vae", "is made by the first stage"),
        network,
        Setting("vae.training.images", images, f"counted each time{minutes}"),
        *further,
        Setting("vae.training.start", shown, f"the demo's weights are a start; {measured}"),
    ]


def without_autoencoder() -> list[Setting]:
    """What goes with `vae.path=null`."""
    return [
        Setting("vae.latent_channels", 3, "the network draws pixels: red, green and blue"),
        Setting("vae.downsampling", 1, "as they are"),
    ]


def planned(recipe: Recipe, found: Look) -> Recipe:
    """The recipe before there are shards that say how many classes and images there are."""
    train = recipe.train
    samples = train.total_samples or (train.epochs or 1) * found.usable
    return replace(with_classes(recipe, found), train=replace(train, epochs=None, total_samples=samples))


def expected_times(recipe: Recipe, found: Look, speeds: Speeds) -> dict[str, float]:
    """Seconds of each stage of a run. All speeds must be known."""
    own = planned(recipe, found)
    times = stage_times(own, found.usable, speeds, select(own, None), "local")
    return {name: time.seconds or 0.0 for name, time in times.items()}


def complete(settings: Sequence[Setting], *, unfit: bool = False) -> Recipe:
    """The recipe of these settings. `unfit`: it is read before all fields are chosen that go together."""
    return parse_recipe(recipe_text(settings), together=not unfit)


def with_classes(recipe: Recipe, found: Look) -> Recipe:
    """The recipe before there are shards that say how many classes there are."""
    return replace(recipe, model=replace(recipe.model, num_classes=len(found.class_names)))


def run_name(images: str) -> str:
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(images).resolve().name.split(".")[0]).strip("-._")
    return stem[:60] or "images"


def crop(found: Look) -> tuple[str, str]:
    """`data.crop`, with its reason."""
    sides = found.sizes.max(axis=1) / found.sizes.min(axis=1)
    if np.quantile(sides, 0.9) <= NEARLY_SQUARE:
        return "resize", "nine of ten images are square or nearly so"
    if found.on_white >= ON_WHITE:
        return "fit", f"{found.on_white:.0%} of the images stand on white: nothing is cut off, the rest is white"
    return "center", "the centred square: the images are of different shapes"


def _resolution(found: Look, machine: Machine) -> int:
    short = float(np.median(found.sizes.min(axis=1)))
    return 32 if short < 48 else 128 if machine.gpus and short >= 128 else 64


def _why_resolution(found: Look, machine: Machine) -> str:
    short = np.median(found.sizes.min(axis=1))
    return f"pixels; half of the images have a shorter side of {short:.0f} or more" + (
        "" if machine.gpus else ", but without a GPU more takes days"
    )


def max_rejected(bad: int, seen: int, found: int) -> tuple[float, str]:
    """`data.max_rejected`, with its reason: of `found` images, `seen` were looked at, and `bad` of these are unusable.

    As many as there are, where all were looked at; else a share that the whole exceeds once in 10,000 times.
    """
    partly = seen < found
    most = bad + (4 * math.sqrt(bad) + 10 if partly else 0)
    # One part in 10,000 more: 0.29 * 100 is below 29.
    share = min(1.0, max(0.001, (math.ceil(1e4 * most / seen) + 1) / 1e4))
    room = f", and up to {share:.2%} are allowed, since not all were looked at" if partly else ""
    return share, f"{bad:,} of {seen:,} images are unusable{room}; more of them stop the encoding"


def _from_demo(demo: Recipe, width: int | None, machine: Machine) -> list[Setting]:
    """width: None leaves width and heads out."""
    settings = []
    for field, reason in FROM_DEMO.items():
        if width is None and field in ("model.hidden_size", "model.num_heads"):
            continue
        value: Any = demo
        for part in field.split("."):
            value = getattr(value, part)
        if field == "model.hidden_size" and value != width:
            value, reason = width, f"wider than the demo's, since there is {'a GPU' if machine.gpus else 'time for it'}"
        settings.append(Setting(field, list(value) if isinstance(value, tuple) else value, reason))
    return settings


def _evaluation(found: Look) -> list[Setting]:
    classes = len(found.class_names)
    drawn = classes * max(1, round(min(max(32 * classes, 128), 512) / classes))
    settings = [Setting("sample.num_samples", drawn, "to look at, and a first distance; thousands make it exact")]
    if found.usable > MOST_COMPARED:
        settings.append(Setting("evaluate.reference_samples", MOST_COMPARED, "images that samples are compared with"))
    if PUBLISHED["efficientnet-lite0"].path is None:
        return settings
    reason = "is installed, where FID's Inception is a download; its distance is not FID"
    return [*settings, Setting("evaluate.feature_extractor", "efficientnet-lite0", reason)]


def _steps(samples: float, batch: int) -> int:
    return batch * max(1, round(samples / batch))


def counted(count: int, what: str) -> str:
    return f"1 {what}" if count == 1 else f"{count:,} {what}es"
