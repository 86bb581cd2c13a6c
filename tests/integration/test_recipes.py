"""Every published recipe runs from the images to the report: the recipe's own file, the real commands.

The data sets, the autoencoder and Inception are stand-ins in their published form (`tests.stand_ins`). Overrides say
where these lie, and ask for less work than a cluster does in days. What `make test` runs is reduced further: the
autoencoder's blocks are narrower, and so is the network, most recipes are measured with a smaller extractor
than Inception. Image size, crops, latents, objective and sampler are the recipe's. `make test-slow` runs the published
sizes.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file

from tests import stand_ins
from tests.forks import ROOT, run_python
from tests.integration.conftest import environment, torchrun

RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml") if path.stem != "demo")  # that is `make demo`
NARROW_NETWORK = ["model.size=S", "model.hidden_size=64", "model.num_heads=2"]
NARROW = {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 8}
SMALLER_EXTRACTOR = ["evaluate.feature_extractor=efficientnet-lite0", "evaluate.feature_extractor_weights=null"]
# How a data set lies on the disk: of so many pictures, of so many pixels where all are of one size.
DATA_SETS: dict[str, Callable[[Path, int, int], Path]] = {
    "imagenet": lambda folder, count, _: stand_ins.imagenet(folder, count),
    "ffhq": stand_ins.ffhq,
    "celebahq": stand_ins.celebahq,
    "lsun": lambda folder, count, _: stand_ins.lsun(folder, count),
}


def settings_of(recipe: str) -> dict:
    return yaml.safe_load((ROOT / f"recipes/{recipe}.yaml").read_text(encoding="utf-8"))


def less(recipe: str, folder: Path, images: Path, vae: Path, inception: Path, steps: int, batch: int) -> list[str]:
    """Where the stand-ins lie, and few steps and samples."""
    source = settings_of(recipe)["data"]["source"]
    return [
        *(f"data.images={images}", f"data.shards={folder / 'shards'}", f"runs={folder / 'runs'}", f"vae.path={vae}"),
        *([f"model.num_classes={len(stand_ins.WNIDS)}"] if source == "imagenet" else []),  # of ImageNet's thousand
        *(f"train.total_samples={steps * batch}", f"train.batch_size={batch}", f"train.log.every_samples={batch}"),
        *("sample.num_samples=4", "sample.num_steps=2", "sample.iterations=2", "sample.save_images=4"),
        *(f"evaluate.feature_extractor_weights={inception}", "evaluate.batch_size=4"),
        *("launch.processes=1", "launch.cpus_per_process=1", "launch.gpus_per_process=0"),
    ]


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=3000)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(stand_ins.inception_tensors(), path)
    return path


@pytest.fixture(scope="module")
def narrow_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stand_ins.autoencoder(tmp_path_factory.mktemp("narrow") / "vae", **NARROW)


@pytest.fixture(scope="module")
def whole_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stand_ins.autoencoder(tmp_path_factory.mktemp("whole") / "vae")


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_runs_from_the_images_to_the_report(
    recipe: str, tmp_path: Path, narrow_vae: Path, inception: Path
) -> None:
    images = DATA_SETS[settings_of(recipe)["data"]["source"]](tmp_path, 5, 300)
    fewer = less(recipe, tmp_path, images, narrow_vae, inception, steps=1, batch=4)
    # Inception's Fréchet distance of one recipe: 2,048 dimensions take seconds.
    smaller = ["evaluate.metrics=[frechet]"] if recipe == "imagenet256" else SMALLER_EXTRACTOR
    given = [*command("pipeline/run.py", recipe)[1:], "--cluster", "debug", *fewer, *NARROW_NETWORK, *smaller]
    done = run_python(*given, environment=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    if recipe == "imagenet256":
        assert_honest(done.stdout, inception)
    check(tmp_path, recipe, count=5, steps=1, batch=4)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_runs_at_its_published_sizes(
    recipe: str, tmp_path: Path, whole_vae: Path, inception: Path
) -> None:
    """Each stage by its own command; training by two ranks, which share the optimizer by ZeRO as the recipe says."""
    source = settings_of(recipe)["data"]["source"]
    count = 50 if recipe == "imagenet256" else 6
    images = DATA_SETS[source](tmp_path, count, 1024)
    fewer = less(recipe, tmp_path, images, whole_vae, inception, steps=2, batch=4)
    run([*command("preprocess/encode_latents.py", recipe), *fewer])
    run([*torchrun(2), *command("pipeline/train.py", recipe)[1:], *fewer])
    run([*command("pipeline/sample.py", recipe), *fewer])
    said = run([*command("pipeline/eval_fid.py", recipe), *fewer])
    assert_honest(said, inception)
    run([*command("pipeline/report.py", recipe), *fewer])
    check(tmp_path, recipe, count, steps=2, batch=4)


def command(script: str, recipe: str) -> list[str]:
    """As the recipe's header has it."""
    return [sys.executable, script, "--config", f"recipes/{recipe}.yaml"]


def assert_honest(said: str, inception: Path) -> None:
    """The distance's line says whose weights it is of, and does not call it FID."""
    from common.files import sha256_file

    line = next(line for line in said.splitlines() if "4 samples after" in line and "=" in line)
    assert line.startswith(f"FD (Inception with weights {sha256_file(inception)[:8]}) = ")
    assert "FID" not in said


def check(folder: Path, recipe: str, count: int, steps: int, batch: int) -> None:
    settings = settings_of(recipe)
    index = json.loads((folder / "shards/index.json").read_text(encoding="utf-8"))
    assert (index["accepted"], index["rejected"]) == (count, [])
    assert index["settings"]["vae"]["scaling_factor"] == 0.18215
    assert index["settings"]["crop"] == settings["data"].get("crop", "center")
    run_folder = folder / "runs" / recipe
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["samples"] for line in lines if "loss" in line] == [batch * step for step in range(1, steps + 1)]
    weights = load_file(run_folder / f"weights/{steps * batch:012d}/0.9999/diffusion_pytorch_model.safetensors")
    assert all(np.isfinite(tensor).all() for tensor in weights.values())
    measured = json.loads((run_folder / "metrics.json").read_text(encoding="utf-8"))
    assert measured["distance"].startswith("FD (")  # not FID, which is of the published weights alone
    assert measured["distances"]["trained"] > 0
    assert (run_folder / "report.html").stat().st_size > 10_000
