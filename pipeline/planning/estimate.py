"""How long each stage takes: from speeds that were measured on this machine, or from operations and a GPU's peak."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from common.errors import NoDataYet, UserError
from common.gpus import GPU
from common.ranks import own_cores, share_cores
from common.recipe import VAE, Recipe, denoiser_config, launch_of
from common.stage import Stage
from common.stage_jobs import plain_steps
from fpdm.calibration import FIT_BATCH, FIT_ITERATIONS, FIT_UPDATES, LIMIT_ITERATIONS, LIMIT_STEPS, SCREENING
from fpdm.flops import forward_flops
from pipeline.planning.disk import portraits
from pipeline.planning.machine import IMAGES, encoding_seconds, evaluation_seconds, sampling_seconds, try_training
from pipeline.sampling.iterates import ITERATIONS, OF_THE_STEPS, SHOWN
from pipeline.sampling.plans import passes
from pipeline.training.identity import precision, total_samples
from pipeline.training.operations import mean_flops
from preprocess.autoencoder.stage import DECODER_COST
from preprocess.demo.portraits import CLASSES
from preprocess.encoding.encoder import Encoder, find_identity, find_vae, load_vae
from preprocess.from_data import from_data, open_latents
from preprocess.sources import open_source
from preprocess.sources.expected_counts import expected_images

# Of the peak in bf16: steps of FPDM-XL/2 and DiT-XL/2 on an H200 (docs/gpu.md). Work in fp32 was not measured apart.
UTILISATION = {"fpdm": 0.40, "dit": 0.33}
START_SECONDS = 15  # of a job's processes
PORTRAIT_SECONDS = 0.004
EFFICIENTNET_SECONDS = 0.12  # of an image on one core, where no extractor can be measured
# An image, from their papers.
EXTRACTOR_FLOPS = {"inception-v3-compat": 11.5e9, "efficientnet-lite0": 0.8e9, "efficientnet-lite2": 1.7e9}
EXTRACTOR_FLOPS |= {"dinov2-vit-l-14-local": 162e9, "dinov2-vit-s-14-local": 11e9}
SD_VAE_FLOPS = (4.14e6, 9.45e6)  # a pixel: encoding, decoding


class Speeds(NamedTuple):
    """Of the work of each stage; None where it is not known."""

    training: float | None = None  # samples a second, over all processes
    autoencoder: float | None = None  # images a second, in its training
    encoding: float | None = None  # seconds an image, in one process
    sampling: float | None = None  # seconds an image, in one process
    evaluation: float | None = None  # seconds an image, in one process
    memory: float | None = None  # bytes of a process that trains


@dataclass(frozen=True)
class StageTime:
    seconds: float | None  # None where the speed is not known
    devices: int  # at once

    @property
    def device_hours(self) -> float:
        return (self.seconds or 0.0) * self.devices / 3600


def count_images(recipe: Recipe) -> int | None:
    """Training images: in the shards, else those that will be encoded, or of the data set that the recipe
    names; None where nothing says so."""
    try:
        return len(open_latents(recipe.data))
    except UserError:
        pass
    if recipe.demo is not None:
        return recipe.demo.per_class * len(CLASSES)
    try:
        return len(open_source(recipe.data).entries)
    except UserError:
        return expected_images(recipe.data.source, recipe.data.images)


def resolved(recipe: Recipe, images: int | None) -> Recipe:
    """`from_data`, and before there are shards from the images. Raises NoDataYet where there are none of these."""
    try:
        return from_data(recipe)
    except NoDataYet:
        if images is None:
            raise
    classes = recipe.model.num_classes or len(open_source(recipe.data).class_names)
    train = recipe.train
    if train.epochs:
        train = replace(train, epochs=None, total_samples=train.epochs * images)
    return replace(recipe, model=replace(recipe.model, num_classes=classes), train=train)


def stage_times(
    recipe: Recipe, images: int, speeds: Speeds, stages: Sequence[Stage], cluster: str
) -> dict[str, StageTime]:
    """Of the stages in turn."""
    times = {}
    for stage in stages:
        planned = plain_steps(recipe, stage, cluster)
        at_once = max(step.at_once * step.resources.nodes * step.resources.processes for step in planned)
        seconds = work_seconds(recipe, images, speeds, stage.name, at_once)
        times[stage.name] = StageTime(None if seconds is None else seconds + START_SECONDS, at_once)
    return times


def work_seconds(recipe: Recipe, images: int, speeds: Speeds, stage: str, at_once: int) -> float | None:
    """Of one stage, without the start of its processes, in so many processes at once."""
    drawn = recipe.sample.num_samples * recipe.evaluate.seed_ranges * (1 + recipe.evaluate.untrained_baseline)
    training = recipe.vae.training
    trained = training.images + DECODER_COST * training.decoder_images if training else 0
    work = {
        "compose": (portraits(recipe) if recipe.demo else 0, PORTRAIT_SECONDS),
        "autoencoder": (trained, speeds.autoencoder and 1 / speeds.autoencoder),
        "encode": (images * (1 + recipe.data.flips), speeds.encoding and speeds.encoding / at_once),
        "train": (total_samples(recipe.train), speeds.training and 1 / speeds.training),
        "sample": (
            drawn + _iterates(recipe) + at_once * _calibration(recipe),  # which one process does, and all wait for
            speeds.sampling and speeds.sampling / at_once,
        ),
        "evaluate": (drawn + compared(recipe, images), speeds.evaluation and speeds.evaluation / at_once),
        "report": (0, 0.0),
    }
    count, each = work[stage]
    seconds = None if each is None else count * each
    limit = recipe.train.max_hours
    return min(seconds or 3600 * limit, 3600 * limit) if stage == "train" and limit else seconds


def compared(recipe: Recipe, images: int) -> int:
    """Images whose features are extracted beside the samples': of the reference and held out, these decoded too."""
    limit, held_out = recipe.evaluate.reference_samples, recipe.data.held_out is not None
    reference = images if limit is None else min(limit, images)
    sets = held_out * (1 if recipe.vae.path is None else 2)
    return reference * (recipe.evaluate.reference is None) + recipe.sample.num_samples * sets


def _iterates(recipe: Recipe) -> float:
    """What the report shows of the fixed point, in images of the recipe's own cost."""
    if recipe.model.kind == "dit":
        return 0.0
    cold = recipe.sample.num_steps * sum(count + denoiser_config(recipe).blocks(0) for count in ITERATIONS)
    return SHOWN * (sum(OF_THE_STEPS) + cold / _own_blocks(recipe))


def _own_blocks(recipe: Recipe) -> int:
    """Of an image drawn as the recipe says, one half of it with guidance."""
    return sum(count + denoiser_config(recipe).blocks(0) for count, _, _ in passes(recipe))


def _calibration(recipe: Recipe) -> float:
    """Fitting a sampler, in images of the recipe's own cost: two limits, and updates that count four images' blocks."""
    if recipe.sample.allocation != "calibrated":
        return 0.0
    limit = LIMIT_STEPS * (LIMIT_ITERATIONS + denoiser_config(recipe).blocks(0))
    updates = FIT_UPDATES * (1 + len(FIT_ITERATIONS) / SCREENING)
    return 2 * recipe.sample.calibration_samples * limit / _own_blocks(recipe) + 4 * FIT_BATCH * updates


def measured(recipe: Recipe, stages: Sequence[str], seconds: float) -> Speeds:
    """On this machine; `stages`: of these alone. Training is measured for so many seconds. An autoencoder that is still
    to be trained is as fast as the one that it starts from.
    """
    share_cores()
    found: dict[str, float] = {}
    images, folder = torch.zeros(IMAGES, 3, recipe.data.resolution, recipe.data.resolution), _like(recipe.vae)
    encoder = Encoder(folder) if find_identity(folder) and {"encode", "sample"} & set(stages) else None
    if "train" in stages:
        trial = try_training(recipe, seconds)
        found |= {"training": trial.samples_a_second, "memory": trial.memory}
    if encoder and "encode" in stages:
        found["encoding"] = encoding_seconds(encoder, images)
    if encoder and "sample" in stages:
        found["sampling"] = sampling_seconds(recipe, encoder)
    if "evaluate" in stages:
        seconds_an_image = evaluation_seconds(recipe.evaluate, recipe.data.resolution)
        found["evaluation"] = seconds_an_image or EFFICIENTNET_SECONDS / own_cores()
    return Speeds(**found)


def _like(vae: VAE) -> VAE:
    """The autoencoder, or one of the same network."""
    start = vae.training and vae.training.start
    return replace(vae, path=start, training=None) if start else vae


def computed(recipe: Recipe, gpu: GPU) -> Speeds:
    """If each process had such a GPU, at UTILISATION of its peak in the precision of the work."""
    launch, used = launch_of(recipe.launch, "train"), 1e12 * UTILISATION[recipe.model.kind]
    training = gpu.fp32_tflops if precision(recipe.train, on_gpu=True) == "fp32" else gpu.tflops
    coding = gpu.fp32_tflops if recipe.vae.precision == "fp32" else gpu.tflops
    encoding, decoding = (flops / (coding * used) for flops in vae_flops(recipe))
    single = gpu.fp32_tflops * used  # samples and features are computed in fp32
    return Speeds(
        training=launch.nodes * launch.processes * training * used / mean_flops(recipe),
        encoding=encoding,
        sampling=sampling_flops(recipe) / single + decoding,
        evaluation=EXTRACTOR_FLOPS[recipe.evaluate.feature_extractor] / single,
    )


def sampling_flops(recipe: Recipe) -> float:
    """Operations of one image's latents."""
    config = denoiser_config(recipe)
    outer, iteration, read_out = forward_flops(config, config.num_tokens)
    return sum(
        (outer + count * iteration * (config.kind == "fpdm") + read_out * bool(weak)) * (1 + twice)
        for count, weak, twice in passes(recipe)
    )


def vae_flops(recipe: Recipe) -> tuple[float, float]:
    """Operations of encoding and of decoding one image; of Stable Diffusion's where the recipe's is not here."""
    from torch.utils.flop_counter import FlopCounterMode

    vae, side = _like(recipe.vae), recipe.data.resolution
    if vae.path is None:
        return 0.0, 0.0
    folder = find_vae(vae)
    if folder is None:
        return SD_VAE_FLOPS[0] * side**2, SD_VAE_FLOPS[1] * side**2
    network, latent = load_vae(folder).to("meta"), side // vae.downsampling
    shapes, counts = ((1, 3, side, side), (1, vae.latent_channels, latent, latent)), []
    for call, shape in zip((network.encode, network.decode), shapes, strict=True):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call(torch.empty(shape, device="meta"))
        counts.append(float(counter.get_total_flops()))
    return counts[0], counts[1]
