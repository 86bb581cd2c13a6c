"""The training loop. It counts samples, and every number in it is a function of (seed, samples seen)."""

import math
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial

import torch

from common.background import Background
from common.errors import Interrupted
from common.recipe import Recipe, denoiser_config, diffusion
from fpdm.weights import assemble
from pipeline.training import checkpoint
from pipeline.training.data import Stream, rank_positions, step_batches
from pipeline.training.deepspeed_config import deepspeed_config
from pipeline.training.distributed import Ranks, raise_on_all_ranks
from pipeline.training.ema import EMAWeights
from pipeline.training.engine import build_engine, scaler_state, set_learning_rate
from pipeline.training.guards import check_finite, not_finite_error
from pipeline.training.identity import crosses, identity, total_samples
from pipeline.training.initial import initial_network
from pipeline.training.log import ProgressBar, TrainingLog, log_values
from pipeline.training.previews import Previewer
from pipeline.training.run_folder import open_run_folder
from pipeline.training.schedule import StepIterations, has_ended, learning_rate, step_iterations
from pipeline.training.signals import StopRequest
from pipeline.training.state import TrainState
from pipeline.training.step import StepResult, train_step
from pipeline.training.throughput import Interval, Throughput
from pipeline.training.zero import gather, parameter_shards, start_moments
from preprocess.shards import LatentShards


class Trainer:
    """One rank's part of a run."""

    def __init__(self, recipe: Recipe, shards: LatentShards, ranks: Ranks, stop: StopRequest | None = None) -> None:
        self.recipe, self.ranks, self.stop = recipe, ranks, StopRequest() if stop is None else stop
        self.total = total_samples(recipe.train)
        with raise_on_all_ranks(ranks):
            self.identity = identity(recipe, shards)
        self.config = deepspeed_config(recipe.train, ranks.world_size)
        network = denoiser_config(recipe)
        resumed = checkpoint.find_checkpoint(recipe, self.identity, ranks)
        if resumed:
            self.state = resumed.state
            model = assemble(checkpoint.part(resumed.tensors, "model"), network)
        else:
            self.state = TrainState()
            with raise_on_all_ranks(ranks):
                model = initial_network(recipe)
        self.samples_saved, self.seconds_before = self.state.samples_seen, self.state.seconds
        self.engine = build_engine(recipe.train, model, self.config, ranks)
        self.ema = EMAWeights(recipe.train.ema, self.engine)
        if resumed:
            checkpoint.restore(self.engine, self.ema, resumed)
        else:
            start_moments(self.engine, 0)
        self.stream = Stream(recipe, shards, diffusion(recipe))
        place = (ranks.rank, ranks.world_size)
        self.batches = step_batches(self.stream, self.state.samples_seen, self.total, *place)
        self.throughput = Throughput(recipe.train.log.peak_tflops, network, self.engine.device, ranks.world_size)
        self.writer = Background()
        self.log: TrainingLog | None = None  # on rank 0
        self.previewer: Previewer | None = None  # on rank 0, where the recipe asks for any

    def run(self) -> None:
        """Trains to the end. Raises Interrupted, on all ranks, where any of them was asked to stop."""
        with self.open(), self.writer, closing(self.batches):  # leaving waits for the checkpoint that is being written
            while not has_ended(self.recipe.train, self.state.samples_seen, self.state.seconds):
                self.step()
            self.save(with_weights=True, wait=True)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Opens the run folder before the first step, and closes the log at the end. All ranks raise its errors."""
        recipe, samples_seen, rank = self.recipe, self.state.samples_seen, self.ranks.rank
        weights = gather(self.engine, parameter_shards(self.engine)) if samples_seen == 0 else {}
        try:
            with raise_on_all_ranks(self.ranks):
                if rank == 0:
                    self.log = open_run_folder(recipe, self.identity, self.config, samples_seen, weights)
                    if recipe.train.previews.grid_every_samples or recipe.train.previews.distance_every_samples:
                        self.previewer = Previewer(recipe, self.log, self.engine.device)
            limit, every = 3600 * (recipe.train.max_hours or math.inf), recipe.train.log.every_samples
            with closing(ProgressBar(self.total, samples_seen, rank, limit, every)) as self.progress:
                self.throughput.start()
                self.started = time.monotonic()
                yield
        finally:
            if self.log is not None:
                self.log.close()

    def step(self) -> None:
        """One step, and what is due after it."""
        self.state = replace(self.state, seconds=self.clock())
        recipe, settings, watch = self.recipe, self.recipe.train, self.throughput.watch
        before, after = self.state.samples_seen, self.state.samples_seen + settings.batch_size
        measures = crosses(before, after, settings.previews.distance_every_samples)
        paints = crosses(before, after, settings.previews.grid_every_samples)
        ends = has_ended(settings, after, self.state.seconds)
        logs = measures or ends or crosses(before, after, settings.log.every_samples)
        saves = not ends and crosses(before, after, settings.checkpoint.every_samples)

        with watch("data"), raise_on_all_ranks(self.ranks, self.stop) as outcome:
            self.writer.check()
            batches = next(self.batches)
        if outcome.stop_requested:
            self.save(with_weights=False, wait=True)
            raise Interrupted(f"{recipe.folder}: saved after {before} samples; run again to go on")

        iterations = step_iterations(settings, recipe.seed, before, self.state.seconds)
        set_learning_rate(self.engine, learning_rate(settings, before, self.state.seconds))
        diffusion = self.stream.diffusion
        result = train_step(
            self.engine, diffusion, batches, iterations, settings, self.ranks, watch, with_residuals=logs
        )
        with watch("ema"):
            self.ema.update(before, after)
        with watch("exchange"):
            self.ranks.add_up(result.sums)
        self.count(result)
        self.throughput.count(settings.batch_size, iterations)
        self.progress.advance(settings.batch_size)

        with watch("previews"):
            distance = self.draw_previews(measures=measures, paints=paints) if measures or paints else None
        if logs:
            self.write_log(result, iterations, distance)
        if saves:
            with watch("save"):
                self.save(with_weights=True, wait=not settings.checkpoint.background)

    def clock(self) -> float:
        """Seconds of training; rank 0's on all ranks where anything depends on them, else their own."""
        seconds = self.seconds_before + time.monotonic() - self.started
        if self.recipe.train.max_hours is None or self.ranks.world_size == 1:
            return seconds
        shared = torch.tensor([seconds if self.ranks.rank == 0 else 0.0], dtype=torch.float64)
        self.ranks.add_up(shared)
        return shared.item()

    def count(self, result: StepResult) -> None:
        """Adds a step to the state and its event to the log. All ranks raise UserError where training must end."""
        recipe, ranks, before = self.recipe, self.ranks, self.state.samples_seen
        positions = rank_positions(recipe.train.batch_size, before, ranks.rank, ranks.world_size)
        scaled, sample_ids = self.config["fp16"]["enabled"], partial(self.stream.sample_ids, positions)
        self.state, event = check_finite(recipe.train, self.state, result, ranks, scaled=scaled, sample_ids=sample_ids)
        if event is not None:
            with raise_on_all_ranks(ranks):
                if self.log is not None:
                    self.log.event(event)
            if self.state.skipped > recipe.train.max_skipped_steps:
                raise not_finite_error(recipe, event, self.state.skipped)

    def draw_previews(self, *, measures: bool, paints: bool) -> tuple[float, str] | None:
        """From the first EMA, on rank 0: a grid of samples, and the distance of some with its name."""
        weights, distance = gather(self.engine, self.ema.shards[self.recipe.train.ema.names[0]]), None
        with raise_on_all_ranks(self.ranks):
            if self.previewer is not None and measures:
                distance = self.previewer.measure(weights, self.state.samples_seen)
            if self.previewer is not None and paints:
                self.previewer.paint(weights, self.state.samples_seen)
        return distance

    def write_log(self, result: StepResult, iterations: StepIterations, distance: tuple[float, str] | None) -> None:
        """The log line of the interval that ends here, on rank 0."""
        speed = self.throughput.read()
        with raise_on_all_ranks(self.ranks):
            if self.log is not None:
                self.log.write(log_values(self.recipe, self.state, result, iterations, speed, distance))
                self.progress.show(self.state, speed)
        self.state = replace(self.state, interval=Interval())

    def save(self, *, with_weights: bool, wait: bool) -> None:
        """Begins a checkpoint, if there is something new to save; `wait`: all ranks wait until it is written.

        A launcher kills the other ranks once one has left, so none leaves before. All ranks raise rank 0's UserError.
        """
        tensors = {}
        if with_weights or self.state.samples_seen > self.samples_saved:
            tensors = checkpoint.collect(self.engine, self.ema)
        state = replace(self.state, scaler=scaler_state(self.engine))
        with raise_on_all_ranks(self.ranks):
            if self.log is not None:
                self.log.sync()  # the log on disk reaches at least as far as the checkpoint, if the machine dies
            if tensors:
                job = partial(checkpoint.write, self.recipe, state, tensors, self.identity)
                self.writer.submit(partial(job, with_weights=with_weights))
            if wait:
                self.writer.wait()
        self.samples_saved = self.state.samples_seen
