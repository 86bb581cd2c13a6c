"""What this machine has, and how fast it does the work of a recipe: measured with the work itself."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch

from common.command import ended_by_signals
from common.errors import UserError, one_line
from common.loading import dump_recipe
from common.log_lines import read_log
from common.ranks import own_cores, own_device
from common.recipe import Evaluate, Recipe, denoiser_config, latent_shape, launch_of
from common.run_folder import RunFolder
from fpdm.denoiser import build_denoiser
from pipeline.features.extractors import NamedExtractor
from pipeline.sampling.generate import draw_images
from pipeline.sampling.plans import unmeasured
from pipeline.training.operations import mean_flops
from pipeline.training.schedule import step_iterations
from pipeline.training.throughput import step_flops
from preprocess.encoding.encoder import Encoder
from preprocess.shards import Sample, write_index, write_shard

SAMPLING_STEPS = 4
IMAGES = 16
STARTING_SECONDS = 300.0  # for processes to start on a machine that does other work too
SAMPLES = 256
ROOT = Path(__file__).parents[2]


class Trial(NamedTuple):
    """What a short training showed."""

    samples_a_second: float  # over all processes
    memory: float  # bytes of one process: its peak


@dataclass(frozen=True)
class Machine:
    cores: int
    gpus: list[str]  # their names
    free_gb: float  # of the disk that holds `folder`

    @property
    def devices(self) -> str:
        gpus = f"{len(self.gpus)} x {self.gpus[0]}" if self.gpus else "no GPU"
        return f"{self.cores} core{'s' * (self.cores > 1)}, {gpus}"

    def __str__(self) -> str:
        return f"{self.devices}, {self.free_gb:,.0f} GB of disk free"


def this_machine(folder: Path) -> Machine:
    """`folder`, or what will hold it, is on the disk in question."""
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [torch.cuda.get_device_name(number) for number in range(count)]
    return Machine(own_cores(), names, shutil.disk_usage(existing).free / 1e9)


def seconds_of(work: Callable[[], Any]) -> float:
    """Of the second call: the first one allocates."""
    work()
    start = time.monotonic()
    work()
    return time.monotonic() - start


def encoding_seconds(vae: Encoder, images: torch.Tensor) -> float:
    """Of one image, by the autoencoder. `images`: (B, 3, H, W) in [-1, 1]."""
    return seconds_of(lambda: vae.encode(images[:IMAGES])) / len(images[:IMAGES])


def sampling_seconds(recipe: Recipe, vae: Encoder) -> float:
    """Of one image, decoded, in one of the recipe's processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // recipe.launch.processes))
    device, few = own_device(), replace(recipe, sample=replace(recipe.sample, num_steps=SAMPLING_STEPS))
    model = build_denoiser(denoiser_config(few), seed=0).to(device).eval()
    index = torch.arange(IMAGES, device=device)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)  # an untrained network draws nothing, which is an error
    seconds = seconds_of(lambda: draw_images(few, unmeasured(few), model, vae, index).cpu())
    torch.set_num_threads(threads)
    return seconds / IMAGES * recipe.sample.num_steps / SAMPLING_STEPS


def evaluation_seconds(evaluate: Evaluate, resolution: int) -> float | None:
    """Of one image, by the extractor on all cores; None where its weights are still to be downloaded."""
    extractor = NamedExtractor(evaluate)
    if not extractor.weights.path.is_file():
        return None
    images = np.zeros((IMAGES, resolution, resolution, 3), np.uint8)
    return seconds_of(lambda: list(extractor.features(images))) / IMAGES


def try_training(recipe: Recipe, seconds: float, steps_a_line: int = 1) -> Trial:
    """Speed and memory of pipeline/train.py itself, with the recipe's processes, on random latents, measured for so
    many seconds after its start, with a log line every so many steps.

    Raises UserError with the command's own words where it does not train.
    """
    with ended_by_signals(), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        short = _endless(recipe, folder, steps_a_line)
        _write_random_shards(folder / "shards", recipe)
        (folder / "recipe.yaml").write_text(dump_recipe(short), encoding="utf-8")
        processes, output = launch_of(recipe.launch, "train").processes, folder / "output"
        with _trained(folder / "recipe.yaml", processes, output) as process:
            lines = _log_lines(process, RunFolder(short.folder).log, output, seconds)
    config, train = denoiser_config(short), short.train
    steps = range(lines[1]["samples"], lines[-1]["samples"], train.batch_size)  # the first lines' steps allocate
    counts = (step_iterations(train, short.seed, samples_seen) for samples_seen in steps)
    operations = sum(train.batch_size * step_flops(config, each) for each in counts)
    trained = sum(steps_a_line * line["step_seconds"] for line in lines[2:])
    flops = operations / trained  # a second; steps differ in their iterations
    return Trial(flops / mean_flops(recipe), lines[-1]["memory_gib"] * 2**30)


def _endless(recipe: Recipe, folder: Path, steps_a_line: int) -> Recipe:
    """The same training, on other latents and without an end, with nothing beside it but the log."""
    train, every_samples = recipe.train, steps_a_line * recipe.train.batch_size
    return replace(
        recipe,
        runs=str(folder),
        data=replace(recipe.data, shards=str(folder / "shards"), flips=False, format="tar", cache=None, stage_in=False),
        train=replace(
            train,
            epochs=None,
            max_pflops=None,
            max_hours=None,
            resume_from=None,
            total_samples=10**9,
            iterations_rise=0.0,
            log=replace(train.log, every_samples=every_samples, tensorboard=False, wandb_project=None),
            previews=replace(train.previews, grid_every_samples=0, distance_every_samples=0),
            checkpoint=replace(train.checkpoint, every_samples=10**9),
        ),
    )


def _log_lines(process: subprocess.Popen[bytes], log: Path, output: Path, seconds: float) -> list[Any]:
    """What a running training writes, until so many seconds after its first line."""
    started, first = time.monotonic(), None
    while process.poll() is None and time.monotonic() - started < STARTING_SECONDS:
        time.sleep(0.2)
        if first is not None and time.monotonic() - first < seconds:
            continue  # to read the log takes time from the ranks, which wait for one another
        lines = read_log(log)
        if lines and first is None:
            first = time.monotonic()
        elif len(lines) > 3:
            return lines
    words = one_line(output.read_text(errors="replace")[-600:], 400)
    words = words or "it took too long to start"
    raise UserError(f"a trial of pipeline/train.py did not train on this machine: {words}")


@contextmanager
def _trained(recipe: Path, processes: int, output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The training in processes of their own, which end with the block."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, str(ROOT / "pipeline/train.py"), "--config", str(recipe)]
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, own_cores() // processes)))  # or the launcher sets it to 1
    environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    with output.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                ranks = psutil.Process(process.pid).children(recursive=True)  # the launcher puts them into other groups
                for member in (process, *ranks):
                    with suppress(psutil.NoSuchProcess):
                        member.kill()
                psutil.wait_procs(ranks)
            process.wait()


def _write_random_shards(folder: Path, recipe: Recipe) -> None:
    channels, height, width = latent_shape(recipe)
    shape = (2 * channels, height, width)
    classes = [str(number) for number in range(recipe.model.num_classes or 1)]
    draw = np.random.default_rng(0)
    samples = [
        Sample(number, str(number), number % len(classes), 64, 64, np.abs(draw.normal(size=shape)).astype("f2"), None)
        for number in range(SAMPLES)
    ]
    folder.mkdir()
    settings = {"flips": False, "vae": {"scaling_factor": 1.0, "shift_factor": 0.0}}
    record = write_shard(folder, 0, samples, settings)  # type: ignore[arg-type]
    write_index(folder, [record], shape, classes)
