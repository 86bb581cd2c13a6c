"""Training. Its schedule is counted in samples, so that neither batch size nor number of ranks changes it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, StrictBool
from pydantic.dataclasses import dataclass

from common.recipe.fields import (
    STRICT,
    AboveZero,
    AtLeastZero,
    BelowOne,
    Count,
    CountOrZero,
    Fraction,
    Number,
    Place,
    Positive,
    TwoOrMore,
    Width,
)
from common.recipe.launch import launch_of

PAPER_SAMPLES = 204_800_000
# Fields that a DiT leaves at their defaults: it has no iterations.
OF_ITERATIONS = ("iterations_rise", "intermediate_loss", "contraction", "sparse_tokens", "dense_end")
POWER = "power-"  # begins the name of a power-function average

if TYPE_CHECKING:
    from common.recipe import Recipe
    from fpdm.timesteps import TimestepDensity


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Optimizer:
    """What updates the weights, and the schedule of its learning rate."""

    name: Literal["adamw", "muon"] = "adamw"
    """`muon`: the matrices of the blocks are updated by Muon, all other parameters by AdamW, at one learning rate."""
    learning_rate: Positive = 1e-4
    """The learning rate after the warm-up."""
    warmup_samples: CountOrZero = 0
    """Samples over which the learning rate rises from 0. 0: no warm-up."""
    learning_rate_decay: Literal["constant", "cosine", "linear"] = "constant"
    """How the learning rate falls to 0 at the end of training. `constant`: it does not fall, as in the paper."""
    weight_decay: AtLeastZero = 0.0
    """Decoupled weight decay."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """Decays of Adam's first and second moments."""
    gradient_clipping: AtLeastZero = 1.0
    """Largest global norm of the gradient; a longer one is scaled down to it. 0: no clipping."""
    offload: StrictBool = False
    """Keep Adam's moments and the fp32 parameters in the host's memory."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Timesteps:
    """Which timesteps training sees, as fractions of model time: 0 is data, 1 is noise (`fpdm.timesteps`)."""

    kind: Literal["uniform", "logit_normal"] = "uniform"
    """`logit_normal`: the logit of the fraction is normal; the middle is seen more often (Esser et al., 2024)."""
    mean: Number = 0.0
    """Mean of that logit. Above 0: more noise."""
    deviation: Positive = 1.0
    """Standard deviation of that logit."""
    shift: Positive = 1.0
    """Moves a fraction x to shift x / (1 + (shift - 1) x). Above 1: more noise, as larger latents need."""
    stratified: StrictBool = False
    """One timestep from each of batch_size equal parts of the distribution in every step, not independent ones."""
    corrected: StrictBool = False
    """Weigh the losses by 1 / density, 10 at most, so that their mean is nearly that of uniform timesteps. false:
    timesteps that are seen more often count more. Logged losses are never weighted."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EMA:
    """fp32 averages of the weights. Sampling uses the first unless sample.ema names another."""

    decays: tuple[Fraction, ...] = (0.9999,)
    """Constant decays, one average each: the factor of the old average in a step of `reference_batch` samples."""
    widths: tuple[Width, ...] = ()
    """Relative widths of power-function averages (Karras et al., CVPR 2024), one average each. From [0.05, 0.1]
    pipeline/reconstruct_ema.py makes any other width after training."""
    reference_batch: Count = 512
    """Samples for which `decays` hold; with another batch size the average is as long in samples."""

    @property
    def names(self) -> list[str]:
        """Of the averages, and of their folders: constant decays as `0.9999`, power functions as `power-0.05`."""
        return [*map(repr, self.decays), *map(power_name, self.widths)]


def power_name(width: float) -> str:
    return f"{POWER}{width!r}"  # all its digits: `pipeline.training.ema.ema_decay` reads it again


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Checkpoints:
    """Checkpoints, from which an interrupted run goes on."""

    every_samples: Count = 5_120_000
    """Samples between two checkpoints, rounded up to full steps, and the most that a kill costs."""
    background: StrictBool = False
    """Write a checkpoint while training goes on; a kill during that costs these steps too."""
    keep: TwoOrMore = 3
    """The newest checkpoints, which are kept. At least 2, because the newest may be damaged."""
    keep_every_samples: CountOrZero = 0
    """The first checkpoint after every multiple of this number of samples is kept for good. 0: none is."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Log:
    """What is written of the progress: metrics.jsonl, TensorBoard and Weights & Biases."""

    every_samples: Count = 51_200
    """Samples between two lines of the log."""
    tensorboard: StrictBool = True
    """Also write TensorBoard's files."""
    wandb_project: str | None = None
    """Also log to this project of Weights & Biases; its package must be installed. null: do not."""
    peak_tflops: Positive | None = None
    """Peak TFLOP/s of one device, for flop_utilisation in the log. null: known for some GPUs."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Previews:
    """What rank 0 draws and measures with the run's first average while training goes on; the other ranks wait."""

    grid_every_samples: CountOrZero = 0
    """Training samples between two grids of generated images. 0: no grids."""
    grid_images: Count = 16
    """Images in a grid, always of the same noise."""
    distance_every_samples: CountOrZero = 0
    """Training samples between two measurements of the Fréchet distance. 0: no measurements."""
    distance_images: TwoOrMore = 1000
    """Images that are generated for such a measurement."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Train:
    """Batches, iterations, precision and memory. Sections below it: timesteps, optimizer, ema, checkpoint, log and
    previews."""

    total_samples: Count | None = None
    """Length of the training in samples, rounded up to a multiple of `batch_size`. null: what `epochs` says, else the
    paper's 204,800,000, which are 400,000 steps of 512. Training ends with the first of this,
    max_pflops and max_hours."""
    epochs: Count | None = None
    """Instead of `total_samples`: how often each image is seen. null: total_samples says it."""
    max_pflops: Positive | None = None
    """Length of the training in 1e15 floating-point operations, as many as its samples take in the mean over the counts
    that are drawn: equal for DiT and FPDM, it gives both the same computation. null: no limit."""
    max_hours: Positive | None = None
    """Length of the training in hours, without the start of processes and what a kill undid. Where the learning rate
    falls, it follows the clock, and two runs differ. null: no limit."""
    batch_size: Annotated[Count, Field(le=10_000_000)] = 512
    """Samples of one step, over all ranks."""
    micro_batch_size: Count | None = None
    """Samples that one rank computes at once. Less than its share of the batch means gradient accumulation. null: all
    of its share."""
    latents: Literal["drawn", "mean"] = "drawn"
    """A sample's latents: drawn anew from the autoencoder's posterior each time it is seen, or the posterior's mean,
    which is easier to learn where the posterior is wide."""
    label_dropout: BelowOne = 0.1
    """Probability that a label is replaced by the null label, which guidance needs."""
    gradient: Literal["sjfb", "jfb", "multi_step"] = "sjfb"
    """Iterations of a step that have a gradient, all after n ~ U{0..N} without (the paper's table of gradients).
    `sjfb`: m ~ U{1..M}. `multi_step`: M. `jfb`: one, so that max_grad_iterations is 1."""
    max_no_grad_iterations: CountOrZero = 6
    """N: a step has n ~ U{0..N} iterations without gradient. The paper's main models use 12; its ablation
    prefers 3 to 6 (FID 43.2 at 6, 61.5 at 12), which cost half."""
    max_grad_iterations: Count = 6
    """M: then m ~ U{1..M} iterations with gradient, or as `gradient` says. The paper's main models use 12."""
    iterations_rise: Fraction = 0.0
    """Part of the training over which N and M rise from 0 and 1 to their values; early steps are cheaper. 0: they are
    constant, as in the paper."""
    intermediate_loss: AtLeastZero = 0.0
    """Weight of a second loss, on what the network predicts from a random earlier iterate of those with gradient; for
    networks that are sampled with few iterations. 0: none, as in the paper."""
    contraction: AtLeastZero = 0.0
    """Weight of a penalty, in every 16th step, on iterations that leave more than 0.8 of a small change near the fixed
    point (after STARS, 2605.26733), so that it comes to rest. In fp32 only. 0: none, as in the paper."""
    sparse_tokens: AboveZero = 1.0
    """Share of each sample's tokens, drawn at random, that the iterations see; the explicit blocks see all. Steps are
    cheaper by most of the iterations (after SPRINT, 2510.21986). 1: all, as in the paper."""
    dense_end: BelowOne = 0.0
    """Part of the training, at its end, in which the iterations see all tokens; with sparse_tokens below 1."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto`: bf16 on GPUs, fp32 on CPUs. `fp16`: on GPUs only, with zero_stage 1 to 3."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed's ZeRO stage. A single rank in fp32 has nothing to share and uses 0."""
    activation_checkpointing: StrictBool = False
    """Recompute blocks and iterations in the backward pass: a third more computation for a fraction of the memory."""
    compile: StrictBool = False
    """torch.compile of each block; takes minutes at the start. Not with zero_stage 3."""
    deepspeed_config: Place | None = None
    """A JSON file of DeepSpeed's settings. What the recipe also says must agree; what it leaves out comes from the
    recipe."""
    resume_from: Place | None = None
    """Folder of a checkpoint, of another run for example, to begin with while this run has none of its own."""
    initial_weights: Place | None = None
    """Folder of weights that a new run begins with, as pipeline/convert.py or another run wrote them. null: random."""
    max_skipped_steps: CountOrZero = 0
    """Steps (not samples) in a row that are skipped if loss or gradient is not finite, before training stops. 0: it
    stops at the first."""
    spike_deviations: Positive | None = 10.0
    """A loss this many standard deviations above those of the last 100 steps is reported in events.jsonl. null: none
    is."""
    timesteps: Timesteps = Timesteps()
    optimizer: Optimizer = Optimizer()
    ema: EMA = EMA()
    checkpoint: Checkpoints = Checkpoints()
    log: Log = Log()
    previews: Previews = Previews()


def wanted_samples(train: Train) -> int:
    """Length of the training in samples. `epochs` must be resolved (`preprocess.from_data`)."""
    assert train.epochs is None
    return train.total_samples or PAPER_SAMPLES


def timestep_density(settings: Timesteps) -> TimestepDensity:
    """The density of timesteps as `fpdm` computes it."""
    from fpdm.timesteps import TimestepDensity

    return TimestepDensity(kind=settings.kind, mean=settings.mean, deviation=settings.deviation, shift=settings.shift)


def check_training(train: Train) -> None:
    """Raises ValueError for fields of the section that do not go together."""
    if train.epochs and train.total_samples:
        raise ValueError(
            f"train.epochs: {train.epochs} beside train.total_samples {train.total_samples}: both are the length of "
            "the training; set one of them, the other to null"
        )
    if train.zero_stage == 0 and train.precision == "fp16":
        raise ValueError(
            "train.zero_stage: at 0 DeepSpeed does not scale the loss that fp16 needs scaled; use 1, 2 or 3"
        )
    if train.zero_stage == 0 and train.optimizer.offload:
        raise ValueError(
            "train.optimizer.offload: ZeRO stage 0 has no optimizer of its own to move; use train.zero_stage 1, 2 or 3"
        )
    if train.optimizer.name == "muon" and train.optimizer.offload:
        raise ValueError("train.optimizer.offload: only of AdamW; set it to false, or train.optimizer.name to adamw")
    if train.gradient == "jfb" and train.max_grad_iterations > 1:
        raise ValueError(
            f"train.max_grad_iterations: {train.max_grad_iterations} with train.gradient jfb, which has one iteration "
            "with gradient; set it to 1, or train.gradient to multi_step or sjfb"
        )
    if train.intermediate_loss and train.max_grad_iterations == 1:
        raise ValueError(
            "train.intermediate_loss: with train.max_grad_iterations 1 no earlier iterate has a gradient; set it to 0"
        )
    if train.contraction and train.precision != "fp32":
        raise ValueError(
            f"train.contraction: found train.precision {train.precision}, and the rounding of any but fp32 hides what "
            "it measures; set train.precision to fp32, or train.contraction to 0"
        )
    if train.dense_end and train.sparse_tokens == 1:
        raise ValueError("train.dense_end: with train.sparse_tokens 1 all of the training is dense; set it to 0")
    if train.zero_stage == 3 and train.compile:
        raise ValueError("train.compile: not with zero_stage 3, which changes parameters' shapes; use 0, 1 or 2")
    if not (train.ema.decays or train.ema.widths):
        raise ValueError("train.ema.decays: sampling needs an average; give one, such as [0.9999]")


def with_world_size(recipe: Recipe, world_size: int) -> Recipe:
    """Resolves `micro_batch_size` for this number of ranks. Elastic training has it no larger on fewer nodes: it must
    fit into the same memory.

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
    if recipe.launch.elastic and train.micro_batch_size is None:
        launch = launch_of(recipe.launch, "train")
        most = max(1, train.batch_size // (launch.nodes * launch.processes))
        micro = max(size for size in range(1, min(most, share) + 1) if share % size == 0)
    if share % micro:
        raise ValueError(
            f"train.micro_batch_size: {micro} does not divide a rank's share of {share} "
            f"(train.batch_size {train.batch_size} over {world_size} ranks); use a divisor of {share}"
        )
    return replace(recipe, train=replace(train, micro_batch_size=micro))


def node_counts(recipe: Recipe) -> list[int]:
    """On how many nodes elastic training may go on: all, and each smaller number whose ranks can share the batch."""
    launch = launch_of(recipe.launch, "train")
    counts = []
    for nodes in range(launch.nodes, 0, -1):
        with suppress(ValueError):
            with_world_size(recipe, nodes * launch.processes)
            counts.append(nodes)
    return counts
