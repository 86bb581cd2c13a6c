"""The recipe: one frozen dataclass a component, every field with its type, its range and its reason.

A field that a YAML file does not name has the default written here; an unknown name is an error (`common.loading`).
Everything counted is counted in samples seen, so that another batch size or number of ranks changes no schedule.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field, Strict, StrictBool, StrictInt
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:  # torch takes seconds to import, and `--help` needs none of it
    from fpdm.denoiser import DenoiserConfig
    from fpdm.diffusion import Diffusion

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


def _is_folder(found: object) -> bool:
    return isinstance(found, str) and re.fullmatch(r"[0-9]{12}", found) is not None


Count = Annotated[StrictInt, Field(ge=1)]
CountOrZero = Annotated[StrictInt, Field(ge=0)]
Number = Annotated[float, Strict()]  # no true, and no "0.1"
Fraction = Annotated[Number, Field(ge=0, le=1)]
Beta = Annotated[Number, Field(ge=0, lt=1)]
Positive = Annotated[Number, Field(gt=0)]
AtLeastZero = Annotated[Number, Field(ge=0)]
Seed = Annotated[StrictInt, Field(ge=0, lt=2**32)]
Width = Annotated[Number, Field(gt=0, lt=0.28)]  # of a power-function average (fpdm.ema)
Place = Annotated[str, "place"]  # a folder or file; `~`, `$NAME` and `${NAME}` are put in (`common.loading.expanded`)
# A number of samples, or the name of its folder, which has 12 digits.
SamplesSeen = Annotated[CountOrZero, BeforeValidator(lambda found: int(found) if _is_folder(found) else found)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DemoPictures:
    """The portraits that `preprocess/demo_images.py` composes; only the demo has this section."""

    per_class: Count = 1024
    held_out_per_class: Count = 128


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Data:
    """Where the pictures come from and where their latents go."""

    images: Place = "data/images"
    held_out: Place | None = None  # pictures that training never sees: a second figure beside the distance
    # folder: one sub-folder a class; webdataset: tars of key.jpg and key.cls; parquet: as Hugging Face writes it. The
    # others are data sets, in every form in which they are passed on (docs/data.md).
    source: Literal["folder", "imagenet", "ffhq", "celebahq", "lsun", "webdataset", "parquet"] = "folder"
    # Of webdataset and parquet, where they cannot be told (null): what holds the image, as `jpg` or a column, and what
    # labels it, as `cls`, `json:label` or a column; "none": one class, whatever labels there are.
    image_field: str | None = None
    label_field: str | None = None
    follow_links: StrictBool = False  # read what symbolic links below `images` lead to, wherever; not in archives
    # center: ADM's, for ImageNet; short_side: LSUN's; resize: Lanczos without a crop, for aligned pictures
    crop: Literal["center", "short_side", "resize"] = "center"
    resolution: Count = 256  # pixels
    shards: Place = "data/shards"  # training also reads any fsspec address (s3://bucket/folder), through `cache`
    shard_samples: Count = 8192
    format: Literal["tar", "ffcv"] = "tar"  # ffcv: the one file that preprocess/beton.py makes; the same samples
    # Copies of shards on a local disk, each proved before it is used. `~` and `$SCRATCH` are those of the machine that
    # trains; in other places they are put in at once.
    cache: str | None = None
    cache_gb: Positive | None = None  # what was used longest ago goes; several times mixed_blocks shards are best
    stage_in: StrictBool = False  # copy all shards into `cache` before the first step, once a node
    order: Literal["random", "block"] = "random"  # block: shards nearly in sequence, for slow or remote storage
    mixed_blocks: Count = 16  # shards whose samples are shuffled together in block order
    lanes: Count = 1  # parts of a step that read shards of their own in block order; best one a node
    flips: StrictBool = True  # a second set of moments, of the mirrored picture
    max_rejected: Fraction = 0.001  # share of unreadable pictures above which encoding stops


@dataclass(frozen=True, kw_only=True, config=STRICT)
class VAE:
    """The autoencoder. Channels and downsampling are here too, so that a dry run needs no weights; they are checked."""

    path: Place = (
        "stabilityai/sd-vae-ft-ema"  # a save_pretrained folder (./folder is never taken for a hub id), or a hub id
    )
    subfolder: str | None = None  # of path, where the VAE lies in it: "vae" in the repositories of SD3 and FLUX
    revision: str | None = None
    latent_channels: Count = 4
    downsampling: Count = 8
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    batch_size: Count = 32


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Model:
    """The denoiser. `size` sets hidden_size, num_heads and depth at once; each of them can be set alone instead."""

    kind: Literal["fpdm", "dit"] = "fpdm"
    size: Literal["S", "B", "L", "XL"] | None = "XL"
    hidden_size: Count | None = None
    num_heads: Count | None = None
    depth: Count | None = None  # DiT's blocks
    patch_size: Count = 2
    mlp_ratio: Positive = 4.0
    pre_depth: CountOrZero = 1
    post_depth: CountOrZero = 1
    pre_post_timestep_conditioning: StrictBool = False  # the paper: pre and post layers do not see the timestep
    num_classes: Count = 1000  # 1: unconditional


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Objective:
    """What the network learns (paper, section 4.1)."""

    schedule: Literal["linear", "cosine", "flow"] = "linear"
    num_timesteps: Count = 1000
    zero_terminal_snr: StrictBool = True
    prediction: Literal["epsilon", "v", "flow"] = "v"
    learned_variance: StrictBool = True
    loss_weight: Literal["none", "p2", "min_snr"] = "none"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Train:
    total_samples: Count = 204_800_000  # 400k steps of 512 (paper: 4 days on 8 GPUs)
    batch_size: Count = 512  # over all ranks
    micro_batch_size: Count | None = None  # of one rank at once; less than its share means gradient accumulation
    learning_rate: Positive = 1e-4
    warmup_samples: CountOrZero = 0
    learning_rate_decay: Literal["constant", "cosine", "linear"] = "constant"  # to zero at total_samples; paper: none
    weight_decay: AtLeastZero = 0.0
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    gradient_clipping: AtLeastZero = 1.0  # of the global norm; 0: none
    label_dropout: Beta = 0.1
    # S-JFB: n ~ U{0..N} iterations without gradient, m ~ U{1..M} with. The paper's main models use 12 and 12; its own
    # table prefers 3-6 (FID 43.2 at 6 against 61.5 at 12), and they cost half.
    max_no_grad_iterations: CountOrZero = 6
    max_grad_iterations: Count = 6
    ema_decays: tuple[Fraction, ...] = (0.9999,)  # each an average kept; of a step of `ema_reference_batch` samples
    ema_widths: tuple[Width, ...] = ()  # power-function averages; 0.05 and 0.1 let any width be made afterwards
    ema_reference_batch: Count = 512
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 on GPUs, fp32 on CPUs; fp16: GPUs alone
    zero_stage: Literal[0, 1, 2, 3] = 2  # a single rank in fp32, with nothing to share, uses 0
    offload_optimizer: StrictBool = False  # Adam's moments and fp32 parameters in the host's memory
    activation_checkpointing: StrictBool = False  # a third more computation for a fraction of the memory
    compile: StrictBool = False  # each block by torch.compile: minutes at the start
    deepspeed_config: Place | None = None  # a JSON file of your own; what it leaves out comes from the recipe
    checkpoint_samples: Count = 5_120_000
    background_saves: StrictBool = False  # true: beside the next steps; a kill costs them too
    keep_checkpoints: Annotated[StrictInt, Field(ge=2)] = 3  # two at least: the newest may be the damaged one
    keep_checkpoint_samples: CountOrZero = 0  # the first checkpoint after each so many samples stays for good; 0: none
    resume_from: Place | None = None  # a checkpoint's folder to begin with, while this run has none of its own
    max_skipped_steps: CountOrZero = 0  # in a row, for a loss or gradient that is not finite; 0: stop at the first
    spike_deviations: Positive | None = 10.0  # a loss so many standard deviations above the last 100 is told
    log_samples: Count = 51_200
    grid_samples: CountOrZero = 0  # every so many a grid of samples is drawn from the first average; 0: never
    grid_pictures: Count = 16
    distance_samples: CountOrZero = 0  # every so many the distance of a few samples of that average is logged; 0: never
    distance_pictures: Annotated[StrictInt, Field(ge=2)] = 1000  # drawn by rank 0 while the others wait
    tensorboard: StrictBool = True
    wandb_project: str | None = None  # Weights & Biases, where it is installed
    peak_tflops: Positive | None = None  # of one device, for flop_utilisation; null: known GPUs alone


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Sample:
    num_samples: Count = 50_000
    batch_size: Count = 32  # of one process at once; sample i does not depend on it
    chunk_samples: Count = 1000  # of one file; what a kill costs
    # What is kept. "chunks": arrays; "features": no pictures but the first, only what the evaluation's extractor sees;
    # "webdataset": tars of PNGs; "npz": chunks, then one file for ADM's evaluator (arr_0); "folder": chunks, then PNGs.
    output: Literal["chunks", "features", "webdataset", "npz", "folder"] = "chunks"
    labels: Literal["balanced", "uniform"] = (
        "balanced"  # as many of each class, worth about 0.1 FID, or drawn at random
    )
    rounding: Literal["half_away", "truncate"] = (
        "half_away"  # to uint8: as DiT, or half a level darker as REPA and EDM2
    )
    sampler: Literal["ddpm", "ddim", "dpm++", "unipc", "flow_euler"] = "ddpm"
    eta: Fraction = 0.0  # ddim's noise
    num_steps: Count = 28
    # A mean of a step, or for allocation "list" one count a step, noisiest first. 28 steps of 8 with one pre and one
    # post layer are the paper's 280 blocks.
    iterations: Count | Annotated[Number, Field(ge=1)] | tuple[Count, ...] = 8
    # "adaptive" (one residual threshold) and "calibrated" (least sum of residuals) are measured on the weights.
    allocation: Literal["constant", "more_at_noise", "more_at_data", "list", "adaptive", "calibrated"] = "constant"
    # With "calibrated": further numbers of steps to try at the same blocks; the one whose samples lie nearest to
    # those of many more steps is taken. Not with ddpm, or eta above 0, whose noise differs with the steps.
    step_choices: tuple[Count, ...] = ()
    reuse: Literal["always", "none", "calibrated"] = "always"  # start a step from the previous step's solution
    solver: Literal["picard", "anderson"] = "picard"  # of the fixed point; picard: the plain iteration of the paper
    # A sample whose relative residual falls to this ends its step there: the iterations are then the most it takes.
    tolerance: Positive | None = None
    calibration_samples: Count = 32  # what "adaptive" and "calibrated" are measured on
    guidance_scale: AtLeastZero = 1.0  # 1: none
    guidance_interval: tuple[Fraction, Fraction] = (0.0, 1.0)  # of t / T where guidance acts; 1 is pure noise
    guidance_channels: Count | None = None  # null: all; 3 is what DiT and FPDM published
    weights: Literal["latest"] | SamplesSeen = "latest"  # or a number of samples seen
    ema: str | None = None  # which average of the weights, as `0.9999` or `power-0.05`; null: the first that is kept
    save_images: Count = 64  # as many of each set are drawn into samples.png


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Evaluate:
    # The DINOv2 ones take weights from a local file, Facebook's `dinov2_vitl14_pretrain.pth` or `dinov2_vits14_...`.
    feature_extractor: Literal[
        "inception-v3-compat", "efficientnet-lite0", "dinov2-vit-l-14-local", "dinov2-vit-s-14-local"
    ] = "inception-v3-compat"
    feature_extractor_weights: Place | None = None  # a local file; otherwise torch-fidelity's usual download
    # null: all that the extractor and the reference give. "frechet" (FID of Inception's published weights), "spatial"
    # (sFID), "inception_score", "kid", "precision_recall".
    metrics: tuple[Literal["frechet", "spatial", "inception_score", "kid", "precision_recall"], ...] | None = None
    batch_size: Count = 64
    reference: Place | None = None  # null: the training pictures; ADM's statistics (.npz); or another run's folder
    reference_samples: Count | None = None  # training pictures compared with, evenly spaced over all; null: all of them
    seed_ranges: Count = 1  # 3: EDM2's protocol, samples 0..N-1, N..2N-1, 2N..3N-1 measured apart; that many more drawn
    # Replicates for the standard error of the Fréchet distance; 0: none.
    bootstrap: Literal[0] | Annotated[StrictInt, Field(ge=2)] = 0
    untrained_baseline: StrictBool = (
        False  # also samples and measures the network before its first step: twice the work
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Sweep:
    """Ways of sampling that `pipeline/sweep.py` compares: every combination, each at every budget of blocks a picture.

    A budget is spent exactly on FPDM: on as many steps as it pays for, the rest on more iterations. DiT takes the steps
    that the budget pays for. Guidance computes a block twice, and pays for both.
    """

    budgets: tuple[Count, ...] = (140, 280, 560)  # the paper's Table 1
    iterations: tuple[Count, ...] = (8,)  # about so many a step: the steps follow from the budget
    num_steps: tuple[Count, ...] | None = None  # or the steps themselves: the iterations follow
    allocation: tuple[Literal["constant", "more_at_noise", "more_at_data", "adaptive", "calibrated"], ...] = (
        "constant",
    )
    reuse: tuple[Literal["always", "none", "calibrated"], ...] = ("always",)
    sampler: tuple[Literal["ddpm", "ddim", "dpm++", "unipc", "flow_euler"], ...] = ("ddpm", "ddim")
    guidance_scale: tuple[AtLeastZero, ...] = (1.0,)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Launch:
    """What one job of a stage asks for, on any cluster. Where it runs is `pipeline/run.py --cluster`."""

    nodes: Count = 1
    processes: Count = 1  # training processes a node: one a GPU
    cpus_per_process: Count = 1
    gpus_per_process: CountOrZero = 0
    timeout_minutes: Count = 240
    signal_seconds: Count = 120  # before the time is over: training saves, and every job is queued again
    jobs: Count = 1  # of one process each, into which SLURM gets encoding, sampling and evaluation


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Recipe:
    """A whole experiment. `name` is its folder below `runs`."""

    name: Name
    runs: Place = "runs"
    seed: Seed = 0
    demo: DemoPictures | None = None
    data: Data = Data()
    vae: VAE = VAE()
    model: Model = Model()
    objective: Objective = Objective()
    train: Train = Train()
    sample: Sample = Sample()
    evaluate: Evaluate = Evaluate()
    sweep: Sweep = Sweep()
    launch: Launch = Launch()

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name


def latent_shape(recipe: Recipe) -> tuple[int, int, int]:
    """(C, h, w) of one latent."""
    side = recipe.data.resolution // recipe.vae.downsampling
    return recipe.vae.latent_channels, side, side


def denoiser_config(recipe: Recipe) -> DenoiserConfig:
    """The network's own settings: `size` resolved, the latents' shape from the VAE. ValueError names a field."""
    from fpdm.denoiser import SIZES, DenoiserConfig

    model = recipe.model
    chosen = dict(SIZES[model.size]) if model.size else {}
    chosen |= {
        key: value for key in ("hidden_size", "num_heads", "depth") if (value := getattr(model, key)) is not None
    }
    return DenoiserConfig(
        kind=model.kind,
        input_size=latent_shape(recipe)[1],
        in_channels=recipe.vae.latent_channels,
        patch_size=model.patch_size,
        mlp_ratio=model.mlp_ratio,
        pre_depth=model.pre_depth,
        post_depth=model.post_depth,
        pre_post_timestep_conditioning=model.pre_post_timestep_conditioning,
        num_classes=model.num_classes,
        self_conditioned=False,  # only imported weights are
        learned_variance=recipe.objective.learned_variance,
        **chosen,
    )


def describe_network(recipe: Recipe) -> str:
    """One line: the network, what it works on, and its exact size."""
    from fpdm.denoiser import count_parameters

    parameters = count_parameters(denoiser_config(recipe))
    return f"network: {recipe.model.kind} on latents {latent_shape(recipe)}, {parameters:,} parameters"


def diffusion(recipe: Recipe) -> Diffusion:
    """The objective as `fpdm` computes it. ValueError names a field that does not go with another."""
    from fpdm.diffusion import Diffusion

    return Diffusion(**vars(recipe.objective))


def with_world_size(recipe: Recipe, world_size: int) -> Recipe:
    """Resolves `micro_batch_size` for this number of ranks.

    Raises ValueError where the ranks do not divide the batch, or a rank's share is no multiple of the micro-batch.
    """
    train = recipe.train
    if train.batch_size % world_size:
        raise ValueError(
            f"train.batch_size: {train.batch_size} is not divisible by the {world_size} ranks; "
            f"use {train.batch_size // world_size * world_size or world_size} or another number of processes"
        )
    share = train.batch_size // world_size
    micro = train.micro_batch_size or share
    if share % micro:
        raise ValueError(
            f"train.micro_batch_size: {micro} does not divide a rank's share of {share} "
            f"(train.batch_size {train.batch_size} over {world_size} ranks); use a divisor of {share}"
        )
    return replace(recipe, train=replace(train, micro_batch_size=micro))
