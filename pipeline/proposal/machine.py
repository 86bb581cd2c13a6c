"""What this machine has, and how fast it does the work of a recipe: measured with the work itself."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import UserError, one_line
from common.loading import dump_recipe
from common.log_lines import read_log
from common.ranks import own_cores, own_device
from common.recipe import Recipe, denoiser_config, latent_shape
from common.run_folder import RunFolder
from fpdm.denoiser import build_denoiser
from pipeline.sampling.generate import draw_images
from pipeline.sampling.plans import unmeasured
from preprocess.encoding.encoder import Encoder
from preprocess.shards import Sample, write_index, write_shard

STEPS = 4  # of the autoencoder's training, and of sampling
IMAGES = 16
TRAINING_SECONDS = 12.0  # measured, after the first log line
STARTING_SECONDS = 300.0  # for processes to start on a machine that does other work too
SAMPLES = 256
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Machine:
    cores: int
    gpus: list[str]  # their names
    free_gb: float  # of the disk that holds `folder`

    def __str__(self) -> str:
        devices = f"{len(self.gpus)} x {self.gpus[0]}" if self.gpus else "no GPU"
        return f"{self.cores} core{'s' * (self.cores > 1)}, {devices}, {self.free_gb:,.0f} GB of disk free"


def this_machine(folder: Path) -> Machine:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [torch.cuda.get_device_name(number) for number in range(count)]
    return Machine(own_cores(), names, shutil.disk_usage(folder).free / 1e9)


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
    device, few = own_device(), replace(recipe, sample=replace(recipe.sample, num_steps=STEPS))
    model = build_denoiser(denoiser_config(few), seed=0).to(device).eval()
    index = torch.arange(IMAGES, device=device)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)  # an untrained network draws nothing, which is an error
    seconds = seconds_of(lambda: draw_images(few, unmeasured(few), model, vae, index).cpu())
    torch.set_num_threads(threads)
    return seconds / IMAGES * recipe.sample.num_steps / STEPS


def training_rate(recipe: Recipe) -> float:
    """Samples a second of pipeline/train.py itself, with the recipe's processes, on random latents.

    Raises UserError with the command's own words where it does not train.
    """
    train = recipe.train
    log = replace(train.log, every_samples=train.batch_size, tensorboard=False)
    previews = replace(train.previews, grid_every_samples=0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _write_random_shards(folder / "shards", recipe)
        short = replace(
            recipe,
            runs=str(folder),
            data=replace(recipe.data, shards=str(folder / "shards"), flips=False),
            train=replace(train, log=log, previews=previews, epochs=None, total_samples=10**9),
        )
        (folder / "recipe.yaml").write_text(dump_recipe(short), encoding="utf-8")
        with _trained(folder / "recipe.yaml", recipe.launch.processes, folder / "output") as process:
            return _rate(process, RunFolder(short.folder).log, folder / "output")


def _rate(process: subprocess.Popen[bytes], log: Path, output: Path) -> float:
    """From the log lines that a running training writes."""
    started, first = time.monotonic(), None
    while process.poll() is None and time.monotonic() - started < STARTING_SECONDS:
        time.sleep(0.2)
        lines = read_log(log) if log.exists() else []
        if lines and first is None:
            first = time.monotonic()
        if first is not None and len(lines) > 2 and time.monotonic() - first > TRAINING_SECONDS:
            steps = lines[2:]  # the first ones allocate
            return (steps[-1]["samples"] - lines[1]["samples"]) / sum(line["step_seconds"] for line in steps)
    words = one_line(output.read_text(errors="replace")[-600:], 400)
    words = words or "it took too long to start"
    raise UserError(f"a trial of pipeline/train.py did not train on this machine: {words}")


@contextmanager
def _trained(recipe: Path, processes: int, output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The training in processes of their own, which end with the block."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, str(ROOT / "pipeline/train.py"), "--config", str(recipe)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    with output.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
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
