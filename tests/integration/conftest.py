"""A tiny experiment, whole: pictures on disk, an untrained autoencoder, shards, and a network of seconds."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.forks import ROOT, run_python
from tests.slurm_cluster.fixtures import slurm, three_nodes, two_nodes  # noqa: F401 (fixtures)

RECIPE = """\
name: tiny
runs: {folder}/runs
data: {{images: {data}/images, held_out: {data}/held-out, shards: {data}/shards, resolution: 32, crop: resize,
  flips: true, shard_samples: 20}}
vae: {{path: {vae}, downsampling: 4}}
model: {{size: null, hidden_size: 32, num_heads: 2, patch_size: 2, num_classes: 2}}
train: {{total_samples: 160, batch_size: 16, optimizer: {{learning_rate: 1.0e-3}}, ema: {{decays: [0.9],
  reference_batch: 16}}, max_no_grad_iterations: 2, max_grad_iterations: 2, checkpoint: {{every_samples: 48}},
  log: {{every_samples: 16}}}}
sample: {{num_samples: 12, batch_size: 5, chunk_samples: 4, sampler: ddim, num_steps: 3, iterations: 2}}
evaluate: {{feature_extractor: efficientnet-lite0, batch_size: 4, untrained_baseline: true}}
"""


@dataclass(frozen=True)
class Experiment:
    """Where the tiny experiment lies, and how its commands are run."""

    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "tiny.yaml"

    def command(self, script: str, *overrides: str) -> list[str]:
        return [sys.executable, str(ROOT / script), "--config", str(self.recipe), *overrides]

    def run(self, script: str, *overrides: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
        """One rank is forked (`tests/forks.py`); more are started by torchrun."""
        command = self.command(script, *overrides)[1:]
        if ranks == 1:
            return run_python(*command, environment=environment())
        command = [*torchrun(ranks), *command]
        return subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=240)


def torchrun(ranks: int) -> list[str]:
    rendezvous = ("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", f"--nproc-per-node={ranks}")
    return [sys.executable, "-m", "torch.distributed.run", *rendezvous]


def environment() -> dict[str, str]:
    """One thread a process, and nothing of a surrounding launcher."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    return kept | {"OMP_NUM_THREADS": "1"}


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A running command; whatever is left of it at the end is killed."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(), cwd=ROOT
    )
    try:
        yield process
    finally:
        kill_all(process)


def kill_all(process: subprocess.Popen[str]) -> None:
    """kill -9 to the process and everything below it; torchrun puts its workers into sessions of their own."""
    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family, timeout=30)


@pytest.fixture(scope="session")
def encoded_images(tmp_path_factory: pytest.TempPathFactory, tiny_vae: Path) -> Experiment:
    """Images of two classes and their shards, made once."""
    folder = tmp_path_factory.mktemp("experiment")
    for part, count in (("images", 25), ("held-out", 5)):
        for label, name in enumerate(("dark", "light")):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                noise = np.random.default_rng([label, number, count]).integers(0, 128, (32, 32, 3), np.uint8)
                Image.fromarray(noise + np.uint8(127 * label)).save(folder / part / name / f"{number:03d}.png")
    made = Experiment(folder)
    made.recipe.write_text(RECIPE.format(folder=folder, data=folder, vae=tiny_vae))
    done = made.run("preprocess/encode_latents.py")
    assert done.returncode == 0, done.stderr
    return made


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory, encoded_images: Experiment, tiny_vae: Path) -> Experiment:
    """Runs are a test file's own: two files that choose the same name do not meet."""
    made = Experiment(tmp_path_factory.mktemp("experiment"))
    made.recipe.write_text(RECIPE.format(folder=made.folder, data=encoded_images.folder, vae=tiny_vae))
    return made
