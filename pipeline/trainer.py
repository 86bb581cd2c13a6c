"""Training under DeepSpeed: a loop counted in samples, every number of which is a function of (seed, samples seen)."""

import json
import math
import time
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from tqdm import tqdm

from common.errors import Interrupted, UserError
from common.files import alone_in, atomic_write, remove_leftovers, write_json
from common.loading import dump_recipe
from common.provenance import provenance
from common.recipe import Recipe, denoiser_config, diffusion, latent_shape, with_world_size
from fpdm.denoiser import Denoiser, build_denoiser
from fpdm.fixed_point import sjfb_counts
from fpdm.weights import assemble, read_extra
from pipeline import checkpoint
from pipeline.data import Batch, Stream
from pipeline.distributed import any_rank, process_group, raise_together, rank_and_world_size
from pipeline.run_folder import weights_folder
from pipeline.signals import StopRequest, stop_requests
from pipeline.training_log import TrainingLog
from pipeline.zero import ExponentialMovingAverage, gather
from preprocess.shards import LatentShards

# Changing one of these in the middle of a run would make it another run.
IDENTITY = {
    "model": None,
    "objective": None,
    "data": ["flips"],
    "train": [
        *("batch_size", "learning_rate", "warmup_samples", "cosine_decay", "weight_decay", "betas"),
        *("gradient_clipping", "label_dropout", "max_no_grad_iterations", "max_grad_iterations"),
        *("ema_decay", "ema_reference_batch"),
    ],
}


def train(recipe: Recipe) -> None:
    """Trains to `train.total_samples`, from the newest checkpoint if there is one; finished runs return at once.

    Raises Interrupted, after all ranks have saved, if any of them is sent a stop signal.
    """
    if finished(recipe):
        return
    rank, world_size = rank_and_world_size()
    try:
        recipe = with_world_size(recipe, world_size)
    except ValueError as error:
        raise UserError(str(error)) from None
    with stop_requests() as stop, alone_in(recipe.folder) if rank == 0 else nullcontext(), process_group():
        Trainer(recipe, open_shards(recipe), rank, world_size, stop).run()


def finished(recipe: Recipe) -> bool:
    """Whether this recipe's averaged weights after its last sample are there."""
    folder = weights_folder(recipe, total_samples(recipe))
    try:
        return folder.exists() and read_extra(folder).get("run") == identity(recipe, open_shards(recipe))
    except UserError:  # no shards any more; the stage before this one says so
        return False


def identity(recipe: Recipe, shards: LatentShards) -> dict[str, Any]:
    """What makes a run this run and no other: field names and values, as JSON gives them back."""
    found: dict[str, Any] = {
        "seed": recipe.seed,
        "data.shards": shards.index["samples_sha256"],
        "train.precision": _precision(recipe),
    }
    if recipe.train.cosine_decay:  # every rate of the schedule depends on its end
        found["train.total_samples"] = recipe.train.total_samples
    for section, names in IDENTITY.items():
        values = vars(getattr(recipe, section))
        found |= {f"{section}.{name}": values[name] for name in names or values}
    return json.loads(json.dumps(found))


def total_samples(recipe: Recipe) -> int:
    """`train.total_samples`, up to whole batches."""
    return math.ceil(recipe.train.total_samples / recipe.train.batch_size) * recipe.train.batch_size


def open_shards(recipe: Recipe) -> LatentShards:
    """The recipe's shards; UserError where they are not what the recipe describes."""
    shards = LatentShards(recipe.data.shards)
    channels, height, width = latent_shape(recipe)
    if shards.shape != (2 * channels, height, width):
        raise UserError(
            f"data.shards: {recipe.data.shards} holds moments of shape {shards.shape}, data.resolution and vae make "
            f"{(2 * channels, height, width)}; encode again or correct the recipe"
        )
    if shards.num_classes != recipe.model.num_classes:
        raise UserError(
            f"model.num_classes: found {recipe.model.num_classes}, {recipe.data.shards} has {shards.num_classes}"
        )
    return shards


def deepspeed_config(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """DeepSpeed's own settings, generated. `micro_batch_size` must be resolved (`with_world_size`)."""
    settings, precision = recipe.train, _precision(recipe)
    assert settings.micro_batch_size is not None
    if precision != "fp32" and settings.zero_stage == 0:
        raise UserError(f"train.zero_stage: 0 keeps no fp32 parameters beside {precision} ones; use 1, 2 or 3")
    return {
        "train_batch_size": settings.batch_size,
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.batch_size // (settings.micro_batch_size * world_size),
        "gradient_clipping": settings.gradient_clipping,
        "zero_optimization": {"stage": settings.zero_stage},
        "zero_allow_untested_optimizer": True,  # torch's own AdamW
        "bf16": {"enabled": precision == "bf16"},
        "steps_per_print": 2**31,  # the loop below does the printing
    }


def _precision(recipe: Recipe) -> str:
    if recipe.train.precision == "auto":
        return "bf16" if torch.cuda.is_available() else "fp32"
    return recipe.train.precision


class Trainer:
    """One rank's part of a run."""

    def __init__(
        self, recipe: Recipe, shards: LatentShards, rank: int, world_size: int, stop: StopRequest | None = None
    ) -> None:
        self.recipe, self.rank, self.world_size = recipe, rank, world_size
        self.stop = StopRequest() if stop is None else stop
        self.diffusion = diffusion(recipe)
        self.control = torch.distributed.new_group(backend="gloo")
        self.stream = Stream(recipe, shards, self.diffusion)
        self.identity = identity(recipe, shards)
        found = checkpoint.newest_checkpoint(recipe, self.identity)
        self.samples_seen, state = found if found else (0, None)
        self.samples_saved = self.samples_seen
        if self.samples_seen > total_samples(recipe):
            raise UserError(
                f"train.total_samples: {recipe.train.total_samples}, but {recipe.folder} has trained on "
                f"{self.samples_seen}; ask for more, or choose another name"
            )
        config = denoiser_config(recipe)
        model = assemble(checkpoint.part(state, "model"), config) if state else build_denoiser(config, seed=recipe.seed)
        self.config = deepspeed_config(recipe, world_size)
        self.engine = self._engine(model)
        settings = recipe.train
        self.ema = ExponentialMovingAverage(
            self.engine, lambda samples: settings.ema_decay ** (samples / settings.ema_reference_batch)
        )
        if state is not None:
            checkpoint.restore(self.engine, self.ema, state, self.samples_seen // settings.batch_size)
        self.log = TrainingLog(recipe, self.samples_seen) if rank == 0 else None

    def run(self) -> None:
        self._describe()
        settings, total = self.recipe.train, total_samples(self.recipe)
        if self.samples_seen == 0:  # the untrained network, for the comparison in the report
            self._export(gather(self.engine, self.ema.shards))
        # Closed by `with`, the bar leaves its line before an error is printed.
        with tqdm(
            total=total, initial=self.samples_seen, unit="sample", desc="train", disable=self.rank != 0, smoothing=0.05
        ) as bar:
            losses: list[Tensor] = []
            started = time.monotonic()
            while self.samples_seen < total:
                batches, counts = self._batches(), self._iterations()
                losses.append(self._step(batches, counts))
                before, self.samples_seen = self.samples_seen, self.samples_seen + settings.batch_size
                self.ema.update(settings.batch_size)
                bar.update(settings.batch_size)
                save = self.samples_seen == total or _crosses(before, self.samples_seen, settings.checkpoint_samples)
                # A log interval also ends with a checkpoint, so that a resumed run logs the same lines.
                if save or _crosses(before, self.samples_seen, settings.log_samples):
                    loss = self._report(losses, counts, time.monotonic() - started)
                    bar.set_postfix(loss=f"{loss:.4f}")
                    losses, started = [], time.monotonic()
                if save:
                    self._save()

    def _step(self, batches: list[Batch], iterations: tuple[int, int]) -> Tensor:
        """One update. Returns this rank's mean loss, still on its device."""
        self._set_learning_rate()
        total = torch.zeros((), device=self.engine.device)
        for batch in batches:
            batch = batch.to(self.engine.device)
            noisy = self.diffusion.add_noise(batch.latents, batch.noise, batch.timesteps)
            output = self.engine(noisy, batch.timesteps, batch.labels, iterations=iterations).output
            terms = self.diffusion.loss(output.float(), batch.latents, batch.noise, batch.timesteps)
            loss = terms["loss"].mean()
            self.engine.backward(loss)
            self.engine.step()
            total += loss.detach() / len(batches)
        return total

    def _batches(self) -> list[Batch]:
        """This rank's micro-batches of the step. All ranks raise the UserError of one that reads damage.

        Where any rank was asked to stop, all save what they have and raise Interrupted.
        """
        settings = self.recipe.train
        assert settings.micro_batch_size is not None
        share = settings.batch_size // self.world_size
        first = self.samples_seen + self.rank * share
        batches, error = [], None
        try:
            for start in range(first, first + share, settings.micro_batch_size):
                batches.append(self.stream.batch(start, settings.micro_batch_size))
        except UserError as damage:
            error = damage
        if any_rank(bool(self.stop), error, self.control):
            if self.samples_seen > self.samples_saved:
                self._save()
            raise Interrupted(f"{self.recipe.folder}: saved after {self.samples_seen} samples; run again to go on")
        return batches

    def _iterations(self) -> tuple[int, int]:
        """The step's S-JFB counts, the same on every rank: a rank that iterates longer would make the others wait."""
        settings = self.recipe.train
        step = self.samples_seen // settings.batch_size
        return sjfb_counts(self.recipe.seed, step, settings.max_no_grad_iterations, settings.max_grad_iterations)

    def _set_learning_rate(self) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, self.samples_seen)

    def _report(self, losses: list[Tensor], counts: tuple[int, int], seconds: float) -> float:
        """Logs the mean loss over all ranks since the last report, and returns it. Raises where it is not finite."""
        summed = torch.stack(losses)
        torch.distributed.all_reduce(summed)
        loss = float(summed.double().mean()) / self.world_size
        settings = self.recipe.train
        first = self.samples_seen - len(losses) * settings.batch_size
        if not math.isfinite(loss):
            raise UserError(
                f"train.learning_rate: the loss became {loss} between samples {first} and {self.samples_seen}; nothing "
                f"was saved since then; lower it from {settings.learning_rate}, or look at these samples"
            )
        if self.log is not None:
            self.log.write(
                samples=self.samples_seen,
                step=self.samples_seen // settings.batch_size,
                loss=loss,
                learning_rate=learning_rate(self.recipe, self.samples_seen - settings.batch_size),
                gradient_norm=_number(self.engine.get_global_grad_norm()),
                no_grad_iterations=counts[0],
                grad_iterations=counts[1],
                samples_per_second=round(len(losses) * settings.batch_size / seconds, 2),
            )
        return loss

    def _engine(self, model: Denoiser) -> Any:
        import deepspeed

        settings = self.recipe.train
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
        )
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=self.config)
        return engine

    def _save(self) -> None:
        """Saves a checkpoint; all ranks raise rank 0's UserError if it refuses to write."""
        error = None
        try:
            checkpoint.save(self.recipe, self.engine, self.ema, self.samples_seen, self.identity)
        except UserError as refusal:
            error = refusal
        raise_together(error, self.control)  # all wait here: a launcher kills the others once one has left
        self.samples_saved = self.samples_seen

    def _export(self, averages: dict[str, Tensor]) -> None:
        if self.rank == 0:
            checkpoint.export_weights(self.recipe, averages, self.samples_seen, self.identity)

    def _describe(self) -> None:
        """Saves the resolved recipe, DeepSpeed's settings and where all came from, before the first step."""
        if self.rank != 0:
            return
        folder = self.recipe.folder
        for written in (folder, folder / "checkpoints", folder / "weights"):
            remove_leftovers(written)
        with atomic_write(folder / "recipe.yaml") as file:
            file.write_text(dump_recipe(self.recipe))
        write_json(folder / "deepspeed.json", self.config)
        with open(folder / "provenance.jsonl", "a") as lines:
            lines.write(json.dumps({"stage": "train", "from_samples": self.samples_seen, **provenance()}) + "\n")


def _number(value: Any) -> float | None:
    """DeepSpeed's gradient norm: a tensor, a float, or None (it keeps none at stage 0 in fp32)."""
    return None if value is None else float(value)


def _crosses(before: int, after: int, interval: int) -> bool:
    """Whether a multiple of `interval` lies in (before, after]."""
    return after // interval > before // interval


def learning_rate(recipe: Recipe, samples_seen: int) -> float:
    """The rate of the step that starts at `samples_seen`: linear warm-up, then constant or a cosine to zero."""
    settings = recipe.train
    rate = settings.learning_rate
    if settings.warmup_samples:
        rate *= min(1.0, (samples_seen + settings.batch_size) / settings.warmup_samples)
    if settings.cosine_decay:
        rate *= 0.5 * (1 + math.cos(math.pi * min(1.0, samples_seen / total_samples(recipe))))
    return rate
