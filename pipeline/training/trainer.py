"""Training under DeepSpeed: a loop counted in samples, every number of which is a function of (seed, samples seen)."""

import math
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from common.errors import Interrupted, UserError
from common.files import disk_errors_as_user_errors, folder_lock, remove_leftovers, write_json
from common.log_lines import append_line
from common.provenance import provenance
from common.ranks import rank_and_world_size
from common.recipe import Recipe, denoiser_config, diffusion, with_world_size
from common.run_folder import counted, ema_names
from common.run_recipe import write_recipe
from fpdm.denoiser import build_denoiser
from fpdm.fixed_point import sjfb_counts
from fpdm.weights import assemble
from pipeline.training import checkpoint
from pipeline.training.background_writer import BackgroundWriter
from pipeline.training.data import Batch, Stream, open_shards, staged
from pipeline.training.distributed import any_rank, control_group, process_group, told_by_all
from pipeline.training.ema import Averages
from pipeline.training.engine import (
    build_engine,
    deepspeed_config,
    learning_rate,
    restore_scaler,
    scaler_state,
    set_learning_rate,
    spoiled_by,
    update,
)
from pipeline.training.feed import Feed
from pipeline.training.guards import SpikeDetector, describe_fault, fault_error, spike_event
from pipeline.training.identity import crosses, identity, total_samples
from pipeline.training.log import Progress, TrainingLog
from pipeline.training.previews import Previews
from pipeline.training.signals import StopRequest, stop_requests
from pipeline.training.throughput import Interval, Throughput, loss_sums
from pipeline.training.trained import finished, tell_damage
from pipeline.training.zero import gather, parameter_shards, start_moments
from preprocess.shards import LatentShards


def train(recipe: Recipe) -> None:
    """Trains to `train.total_samples`, from the newest checkpoint if there is one; finished runs return at once.

    Raises Interrupted, after all ranks have saved, if any of them is sent a stop signal.
    """
    if finished(recipe):
        return
    rank, world_size = rank_and_world_size()
    tell_damage(recipe, rank)
    try:
        recipe = with_world_size(recipe, world_size)
    except ValueError as error:
        raise UserError(str(error)) from None
    with ExitStack() as open_things:
        stop = open_things.enter_context(stop_requests())
        open_things.enter_context(process_group())
        control = control_group()
        with told_by_all(control):
            if rank == 0:
                with disk_errors_as_user_errors(recipe.folder):
                    open_things.enter_context(folder_lock(recipe.folder))
            shards = staged(recipe, open_shards(recipe))
            shards.prove_places(rank, world_size)
        Trainer(recipe, shards, rank, world_size, control, stop).run()


@dataclass(frozen=True)
class StepResult:
    """What one rank knows of a step.

    sums (10,) float64 on the CPU: `loss_sums`, then this rank's share of the mean residual of the last iteration.
    norm: of the gradient over all ranks; not finite where nothing was updated.
    losses: each micro-batch's, by sample.
    """

    sums: Tensor
    norm: float
    losses: list[Tensor]


class Trainer:
    """One rank's part of a run."""

    def __init__(
        self,
        recipe: Recipe,
        shards: LatentShards,
        rank: int,
        world_size: int,
        control: Any,
        stop: StopRequest | None = None,
    ) -> None:
        """`control`: the group of `control_group`."""
        self.recipe, self.rank, self.world_size, self.control = recipe, rank, world_size, control
        self.stop = StopRequest() if stop is None else stop
        self.total, self.diffusion = total_samples(recipe), diffusion(recipe)
        self.identity = identity(recipe, shards)
        self.config = deepspeed_config(recipe, world_size)
        found = self._checkpoint()
        self._resume_at(found)
        network = denoiser_config(recipe)
        state = checkpoint.part(found.state, "model") if found else None
        model = assemble(state, network) if state else build_denoiser(network, seed=recipe.seed)
        self.engine = build_engine(recipe, model, self.config)
        self.averages = Averages(recipe, self.engine)
        if found:
            checkpoint.restore(self.engine, self.averages, found.state, self.updates)
            restore_scaler(self.engine, found.progress["scaler"])
        else:
            start_moments(self.engine, 0)
        self.feed = Feed(recipe, Stream(recipe, shards, self.diffusion), rank, world_size, self.total)
        self.throughput = Throughput(recipe, network, self.engine.device, world_size)
        self.writer = BackgroundWriter()
        self.previews: Previews | None = None  # on rank 0, where the recipe asks for any
        self.log: TrainingLog | None = None
        self.fault: UserError | None = None  # of rank 0's files, told to all at the next step

    def _checkpoint(self) -> checkpoint.Found | None:
        """The one that rank 0 finds: over a network file system another rank may still see an older listing."""
        found = None
        with told_by_all(self.control):
            if self.rank == 0:
                found = checkpoint.newest_checkpoint(self.recipe, self.identity)
        chosen = [found.folder if found else None]
        torch.distributed.broadcast_object_list(chosen, src=0, group=self.control)
        with told_by_all(self.control):
            if chosen[0] is not None and found is None:
                found = checkpoint.whole_checkpoint(chosen[0], self.recipe, self.identity)
        return found

    def _resume_at(self, found: checkpoint.Found | None) -> None:
        """Sets what the loop counts to where the checkpoint stands, or to nothing."""
        settings, progress = self.recipe.train, found.progress if found else {}
        self.samples_seen = self.samples_saved = found.samples_seen if found else 0
        self.updates: int = progress.get("updates", 0)
        self.skipped: int = progress.get("skipped", 0)  # steps in a row
        self.interval = Interval(**progress.get("interval", {}))
        self.spikes = SpikeDetector(settings.spike_deviations, progress.get("recent_losses", []))
        if self.samples_seen > self.total:
            raise UserError(
                f"train.total_samples: {settings.total_samples}, but {self.recipe.folder} has trained on "
                f"{self.samples_seen}; ask for more, or choose another name"
            )

    def _progress(self) -> dict[str, Any]:
        """What `_resume_at` goes on from, JSON-able."""
        return {
            "updates": self.updates,
            "skipped": self.skipped,
            "interval": asdict(self.interval),
            "recent_losses": list(self.spikes.recent),
            "scaler": scaler_state(self.engine),
        }

    def run(self) -> None:
        self._begin()
        progress = Progress(self.total, self.samples_seen, self.rank)
        self.throughput.start()
        try:
            with self.writer, self.feed:  # leaving waits for the checkpoint in hand, whatever the reason
                while self.samples_seen < self.total:
                    self._advance(progress)
                self._save(with_weights=True, wait=True)
        finally:
            progress.close()
            if self.log is not None:
                self.log.close()

    def _advance(self, progress: Progress) -> None:
        """One step, and what is due after it."""
        settings, watch, before = self.recipe.train, self.throughput.watch, self.samples_seen
        after = before + settings.batch_size
        measures = crosses(before, after, settings.previews.distance_every_samples)
        logs = measures or after == self.total or crosses(before, after, settings.log.every_samples)
        with watch("data"):
            batches = self._batches()
        iterations = self._iterations()
        result = self._step(batches, iterations, with_residuals=logs)
        with watch("averages"):
            self.averages.update(before, after)
        with watch("exchange"):
            torch.distributed.all_reduce(result.sums, group=self.control)
        self._judge(result)
        self.samples_seen = after
        self.throughput.count(settings.batch_size, iterations)
        progress.advance(settings.batch_size)
        with watch("pictures"):
            distance = self._measure() if measures else None
        if logs:
            self._report(progress, result, iterations, distance)
        if crosses(before, after, settings.previews.grid_every_samples):
            with watch("pictures"):
                self._paint()
        if crosses(before, after, settings.checkpoint.every_samples) and after < self.total:
            with watch("save"):
                self._save(with_weights=True, wait=not settings.checkpoint.background)

    def _step(self, batches: list[Batch], iterations: tuple[int, int], *, with_residuals: bool) -> StepResult:
        """One update, unless its gradient is not finite."""
        settings, watch = self.recipe.train, self.throughput.watch
        set_learning_rate(self.engine, learning_rate(self.recipe, self.samples_seen))
        sums, norm = torch.zeros(10, dtype=torch.float64, device=self.engine.device), math.nan
        all_losses = []
        for number, batch in enumerate(batches, 1):
            with watch("forward"):
                batch = batch.to(self.engine.device)
                losses, residuals = self._forward(batch, iterations, with_residuals)
                sums[:-1] += loss_sums(losses, batch.timesteps, self.diffusion.num_timesteps)
                if residuals is not None:
                    sums[-1] += residuals[:, -1].double().sum() / settings.batch_size
                all_losses.append(losses.detach())
            with watch("backward"):
                self.engine.backward(spoiled_by(losses.mean()))
            with watch("optimizer"):
                if number < len(batches):
                    self.engine.step()  # counts the micro-batch
                else:
                    norm = update(self.engine, settings.optimizer.gradient_clipping)
        return StepResult(sums.cpu(), norm, all_losses)

    def _forward(self, batch: Batch, iterations: tuple[int, int], with_residuals: bool) -> tuple[Tensor, Tensor | None]:
        """Losses (B,) and residuals (B, n + m)."""
        noisy = self.diffusion.add_noise(batch.latents, batch.noise, batch.timesteps)
        answer = self.engine(
            noisy,
            batch.timesteps,
            batch.labels,
            iterations=iterations,
            with_residuals=with_residuals,
            activation_checkpointing=self.recipe.train.activation_checkpointing,
        )
        terms = self.diffusion.loss(answer.output.float(), batch.latents, batch.noise, batch.timesteps)
        return terms["loss"], answer.residuals

    def _batches(self) -> list[Batch]:
        """This rank's micro-batches of the step.

        All ranks raise the UserError of one that reads damage or cannot write. Where any rank was asked to stop, all
        save what they have and raise Interrupted.
        """
        batches, error = [], self.fault
        try:
            self.writer.check()
            batches = self.feed.batches(self.samples_seen)
        except UserError as fault:
            error = error or fault
        if any_rank(bool(self.stop), error, self.control):
            self._save(with_weights=False, wait=True)
            raise Interrupted(f"{self.recipe.folder}: saved after {self.samples_seen} samples; run again to go on")
        return batches

    def _iterations(self) -> tuple[int, int]:
        """The step's S-JFB counts, the same on every rank: a rank that iterates longer would make the others wait."""
        settings = self.recipe.train
        step = self.samples_seen // settings.batch_size
        return sjfb_counts(self.recipe.seed, step, settings.max_no_grad_iterations, settings.max_grad_iterations)

    def _judge(self, result: StepResult) -> None:
        """Counts the step, or what was wrong with it. All ranks raise UserError where training must not go on."""
        settings = self.recipe.train
        loss = float(result.sums[0]) / settings.batch_size
        if math.isfinite(loss) and math.isfinite(result.norm):
            self.updates, self.skipped = self.updates + 1, 0
            self.interval.add(result.sums.tolist(), settings.batch_size)
            deviations = self.spikes.check(loss)
            if deviations is not None and self.log is not None:
                self.log.event(spike_event(self.recipe, self.samples_seen, loss, deviations))
            return
        self.interval.skipped += 1
        if math.isfinite(loss) and self.config["fp16"]["enabled"]:
            return  # the loss scaler's search for its scale
        found: list[list[int]] = [[] for _ in range(self.world_size)]
        torch.distributed.all_gather_object(found, self._not_finite(result), group=self.control)
        event = describe_fault(self.recipe, self.samples_seen, loss, result.norm, [*chain.from_iterable(found)])
        if self.log is not None:
            self.log.event(event)
        if self.skipped == settings.max_skipped_steps:
            raise fault_error(self.recipe, event, self.skipped)
        self.skipped += 1

    def _not_finite(self, result: StepResult) -> list[int]:
        """This rank's samples whose loss is not finite."""
        losses = torch.cat(result.losses).tolist()
        ids = self.feed.sample_ids(self.samples_seen)
        return [number for number, loss in zip(ids, losses, strict=True) if not math.isfinite(loss)]

    def _report(
        self, progress: Progress, result: StepResult, iterations: tuple[int, int], distance: tuple[float, str] | None
    ) -> None:
        """The log line of the interval that ends here, on rank 0; gradient norm and residual are the last step's."""
        speed, interval, self.interval = self.throughput.read(), self.interval, Interval()
        if self.log is None:
            return
        settings = self.recipe.train
        values = {
            "samples": self.samples_seen,
            "step": self.samples_seen // settings.batch_size,
            **interval.means(),
            "residual": float(result.sums[-1]) if self.recipe.model.kind == "fpdm" else None,
            "gradient_norm": result.norm,
            "learning_rate": learning_rate(self.recipe, self.samples_seen - settings.batch_size),
            "no_grad_iterations": iterations[0],
            "grad_iterations": iterations[1],
            **speed,
        }
        words = {}
        if distance is not None:
            values["distance"], words["distance_name"] = distance
        values = {name: value if value is None or math.isfinite(value) else None for name, value in values.items()}
        try:
            with disk_errors_as_user_errors(self.log.metrics):
                self.log.write(values, **words)
        except UserError as fault:
            self.fault = fault
        progress.show(values)

    def _save(self, *, with_weights: bool, wait: bool = False) -> None:
        """Begins a checkpoint, if there is something new to save; `wait`: all ranks until it is written.

        A launcher kills the others once one has left, so none may leave before. All ranks raise rank 0's UserError.
        """
        state = {}
        if with_weights or self.samples_seen > self.samples_saved:
            state = checkpoint.collect(self.engine, self.averages)
        with told_by_all(self.control):
            if self.log is not None:
                self.log.sync()  # no checkpoint is further than the log, whatever a node's end leaves of either
            if state:
                arguments = (self.recipe, state, self.samples_seen, self.identity, self._progress())
                self.writer.start(partial(checkpoint.write, *arguments, with_weights=with_weights))
            if wait:
                self.writer.wait()
        self.samples_saved = self.samples_seen

    def _paint(self) -> None:
        """A grid of samples from the first average, on rank 0."""
        weights = self._first_average()
        try:
            if self.previews is not None:
                self.previews.paint(weights, self.samples_seen)
        except UserError as fault:
            self.fault = fault

    def _measure(self) -> tuple[float, str] | None:
        """The distance of samples from the first average and its name, on rank 0."""
        weights = self._first_average()
        return None if self.previews is None else self.previews.measure(weights, self.samples_seen)

    def _first_average(self) -> dict[str, Tensor]:
        return gather(self.engine, self.averages.shards[ema_names(self.recipe)[0]])

    def _begin(self) -> None:
        """What is written before the first step. All ranks raise rank 0's UserError."""
        new = self.samples_seen == 0
        weights = gather(self.engine, parameter_shards(self.engine)) if new else {}
        with told_by_all(self.control):
            if self.rank == 0:
                with disk_errors_as_user_errors(self.recipe.folder):
                    self._describe()
                    self.log = TrainingLog(self.recipe, self.samples_seen, self.identity)
                    if new:  # the untrained network, by every average's name, for the comparison in the report
                        averages = dict.fromkeys(ema_names(self.recipe), weights)
                        checkpoint.export_averages(self.recipe, averages, 0, self.identity)
                if self.recipe.train.previews.grid_every_samples or self.recipe.train.previews.distance_every_samples:
                    self.previews = Previews(self.recipe, self.log, self.engine.device)

    def _describe(self) -> None:
        """Saves the resolved recipe, DeepSpeed's settings and where all came from, before the first step."""
        folder = self.recipe.folder
        for written in (folder, folder / "checkpoints", folder / "grids", *counted(folder / "weights")):
            remove_leftovers(written)
        write_recipe(self.recipe)
        write_json(folder / "deepspeed.json", self.config)
        append_line(folder / "provenance.jsonl", {"stage": "train", "from_samples": self.samples_seen, **provenance()})
