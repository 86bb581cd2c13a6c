"""What `benchmarks/gpu.py` measures, a function a part; its docstring says what each is."""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.network import DIT_DEPTH, TRAINING, peak_bytes, take_turns
from benchmarks.train import make_shards
from common.errors import one_line
from common.loading import parse_recipe
from common.recipe import Evaluate, Recipe, with_world_size
from common.run_folder import RunFolder
from fpdm import SIZES, Denoiser, DenoiserConfig, Diffusion, build_denoiser, count_parameters, sample

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden"
BF16_HALF_UNIT = 2.0**-9
LOSSES_TO = {"bf16": 0.005, "fp16": 0.005, "fp32": 1e-4}  # relative, as tests/integration/test_golden_losses.py has it
PAPERS_MEMORY = 0.4  # of DiT's in training: 60 % less (Bai & Melas-Kyriazi 2024, abstract)
OPTIMIZER_BYTES = 14  # a parameter, in bf16: its weight, and in float32 the weight and AdamW's two moments
STEPS, BATCH = 6, 16  # of the trainings whose losses are compared
GOES_ON = 24  # steps of the one that is killed
# By a training; DeepSpeed imports the compiler by Muon.
IMPORTED = ["deepspeed.runtime.zero.muon.muon_optimizer", "torch.utils.flop_counter", "pipeline.training.run"]


@dataclass(frozen=True)
class Row:
    """One number. `met`: whether it is within its bound; None where it has none."""

    name: str
    value: float
    unit: str
    note: str = ""
    met: bool | None = None


@dataclass(frozen=True)
class Setting:
    """Where and how large everything is."""

    device: str
    smoke: bool
    folder: Path  # for what is trained

    @property
    def size(self) -> dict[str, int]:
        return SIZES["S" if self.smoke else "XL"] | ({"hidden_size": 64, "num_heads": 2} if self.smoke else {})

    @property
    def batch(self) -> int:
        return 2 if self.smoke else 64  # the paper's 512 on 8 GPUs


def golden(setting: Setting) -> Iterator[Row]:
    sys.path.insert(0, str(GOLDEN))
    import compare
    import rounding

    for name in ("dit",) if setting.smoke else ("dit", "fpdm_1_1", "fpdm_1_1_time", "fpdm_2_0"):
        model, entries = compare.read(GOLDEN / f"{name}.safetensors")
        in_bf16 = [compare.outputs, compare.gradients]

        def low(model: Denoiser = model, entries: dict = entries, parts: list = in_bf16) -> Iterator[tuple]:
            return (each for part in parts for each in part(model, entries))

        def high(model: Denoiser = model, entries: dict = entries) -> Iterator[tuple]:
            return low(model, entries) if setting.smoke else compare.results(model, entries)

        difference = compare.relative_difference
        with patch.object(rounding, "HALF_UNIT", BF16_HALF_UNIT):
            bounds = {"bf16": rounding.bounds(low, difference)}
        bounds["fp32"] = rounding.bounds(high, difference)
        for precision, dtype, compute in (("fp32", torch.float32, high), ("bf16", torch.bfloat16, low)):
            moved = model.to(setting.device, dtype)
            there = {key: _moved(value, setting.device, dtype) for key, value in entries.items()}
            with torch.device(setting.device):
                found = {key: value.detach().float().cpu() for key, value in compute(moved, there)}
            differences = {key: difference(value, entries[key]) for key, value in found.items()}
            worst = max(differences, key=lambda key: differences[key] / max(bounds[precision][key], 1e-30))
            above = sum(differences[key] > bounds[precision][key] for key in differences)
            note = f"{above} of {len(found)} entries above their bounds; nearest its bound: {worst}"
            share = differences[worst] / max(bounds[precision][worst], 1e-30)
            yield Row(f"{name}, {precision}", share, "of the bound", note, above == 0)
            model.to("cpu", torch.float32)


def _moved(value: torch.Tensor, device: str, dtype: torch.dtype) -> torch.Tensor:
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


def tiny_recipe(setting: Setting, name: str, *overrides: str, steps: int = STEPS) -> Recipe:
    """A training of seconds: a small FPDM on random latents."""
    shards = setting.folder / "shards"
    if not shards.exists():
        make_shards(shards, 256)
    width, heads = (64, 2) if setting.smoke else (384, 6)
    given = (
        *(f"name={name}", f"runs={setting.folder / 'runs'}", f"data.shards={shards}", "data.flips=false"),
        *("model.size=null", f"model.hidden_size={width}", f"model.num_heads={heads}", "model.num_classes=10"),
        f"model.patch_size={8 if setting.smoke else 2}",
        *("train.precision=fp32", f"train.batch_size={BATCH}", f"train.total_samples={BATCH * steps}"),
        *(f"train.log.every_samples={BATCH}", "train.log.tensorboard=false", "train.optimizer.warmup_samples=0"),
        *("train.max_no_grad_iterations=2", "train.max_grad_iterations=2"),
    )
    return with_world_size(parse_recipe("name: gpu", [*given, *overrides]), 1)


def losses(recipe: Recipe) -> np.ndarray:
    """(steps,) from the log."""
    lines = RunFolder(recipe.folder).log.read_text().splitlines()
    return np.array([json.loads(line)["loss"] for line in lines if "loss" in line], dtype=np.float64)


def _train(recipe: Recipe, device: str) -> None:
    """In a process of its own."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 2))
    descriptor = os.open(_words(recipe), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)  # of compilers that DeepSpeed starts, too
    os.dup2(descriptor, 2)
    from pipeline.training.run import train

    train(recipe)


def _words(recipe: Recipe) -> Path:
    return recipe.folder.parent / f"{recipe.name}.txt"


def started(recipe: Recipe, device: str) -> multiprocessing.process.BaseProcess:
    """A training process. Without a GPU it is forked from a server that has imported all; CUDA survives no fork."""
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    if not torch.cuda.is_available():
        context.set_forkserver_preload(IMPORTED)
    recipe.folder.parent.mkdir(parents=True, exist_ok=True)
    process = context.Process(target=_train, args=(recipe, device), daemon=True)
    process.start()
    return process


def trained(recipe: Recipe, device: str) -> np.ndarray:
    """The losses of a training. RuntimeError with its last words where it fails."""
    process = started(recipe, device)
    try:
        process.join()
    finally:
        process.kill()  # where the time was up
    if process.exitcode:
        raise RuntimeError(_last_words(recipe) or f"ended with status {process.exitcode}")
    return losses(recipe)


def _last_words(recipe: Recipe) -> str:
    text = _words(recipe).read_text().strip()
    return one_line(text.splitlines()[-1]) if text else ""


def compared(name: str, found: np.ndarray, expected: np.ndarray, bound: float) -> Row:
    if found.shape != expected.shape:
        return Row(name, float("inf"), "relative", f"{len(found)} steps of {len(expected)}", False)
    difference = float(np.abs(found / expected - 1).max())
    return Row(name, difference, "relative", f"losses of {len(found)} steps; bound {bound:g}", difference <= bound)


def attempted(name: str, row: Callable[[], Row]) -> Row:
    """A row, or its error: others of the part still run."""
    try:
        return row()
    except RuntimeError as error:
        return Row(name, float("nan"), "", one_line(f"failed: {error}", 300), False)


def zero(setting: Setting) -> Iterator[Row]:
    expected = trained(tiny_recipe(setting, "cpu", "train.zero_stage=0"), "cpu")
    precisions = ("bf16",) if setting.device == "cpu" else ("bf16", "fp16")
    for precision in precisions:
        for stage in (2,) if setting.smoke else (1, 2, 3):
            name = f"ZeRO {stage}, {precision}"
            recipe = tiny_recipe(
                setting, f"{stage}{precision}", f"train.zero_stage={stage}", f"train.precision={precision}"
            )
            yield attempted(
                name,
                lambda name=name, recipe=recipe, precision=precision: compared(
                    name, trained(recipe, setting.device), expected, LOSSES_TO[precision]
                ),
            )


def compile(setting: Setting) -> Iterator[Row]:
    if setting.smoke:
        return  # minutes on a CPU
    given = ("train.precision=bf16", "train.zero_stage=2")
    plain = trained(tiny_recipe(setting, "plain", *given), setting.device)
    compiled = trained(tiny_recipe(setting, "compiled", *given, "train.compile=true"), setting.device)
    yield compared("compiled against not", compiled, plain, LOSSES_TO["bf16"])


def resume(setting: Setting) -> Iterator[Row]:
    given = (f"train.checkpoint.every_samples={4 * BATCH}", "train.optimizer.warmup_samples=64")
    whole, killed = (tiny_recipe(setting, name, *given, steps=GOES_ON) for name in ("whole", "killed"))
    expected = trained(whole, setting.device)
    process, log = started(killed, setting.device), RunFolder(killed.folder).log
    try:
        while process.is_alive() and not (log.exists() and log.read_text().count("\n") > 9):
            time.sleep(0.002)
    finally:  # also where the time is up
        process.kill()
        process.join()
    at = len(losses(killed)) if log.exists() else 0
    found = trained(killed, setting.device)
    row = compared("killed and resumed against not", found, expected, LOSSES_TO["fp32"])
    yield Row(row.name, row.value, row.unit, f"{row.note}; killed after {at} of {GOES_ON} steps", row.met)


def networks(setting: Setting) -> dict[str, Denoiser]:
    """FPDM and DiT of the same width, in bf16."""
    size = {"depth": 4 if setting.smoke else DIT_DEPTH}
    configs = {
        "FPDM": DenoiserConfig(**(setting.size | size)),  # type: ignore[arg-type]
        "DiT": DenoiserConfig(kind="dit", **(setting.size | size)),  # type: ignore[arg-type]
    }
    return {name: build_denoiser(config, device=setting.device).to(torch.bfloat16) for name, config in configs.items()}


def training(setting: Setting) -> Iterator[Row]:
    from pipeline.training.schedule import StepIterations
    from pipeline.training.throughput import known_peak, step_flops

    found, peak = networks(setting), known_peak()
    inputs = _inputs(setting)

    def step(name: str) -> Callable[[], object]:
        model, counts = found[name], {"iterations": TRAINING} if name == "FPDM" else {}
        return lambda: torch.autograd.grad(model(*inputs, **counts).output.square().mean(), list(model.parameters()))  # type: ignore[arg-type]

    calls = {name: step(name) for name in found}
    seconds = {name: min(each) for name, each in take_turns(calls, 1 if setting.smoke else 5, setting.device).items()}
    held = {}
    for name, model in found.items():
        held[name] = peak_bytes(calls[name], setting.device) + OPTIMIZER_BYTES * count_parameters(model.config)
        counts = StepIterations(*TRAINING if name == "FPDM" else (0, 0), intermediate=0)
        tflops = setting.batch * step_flops(model.config, counts) / seconds[name] / 1e12
        of_peak = f"{tflops:.4g} TFLOP/s" + (f", {100 * tflops / peak:.0f} % of the peak" if peak else "")
        yield Row(f"{name}, a step of {setting.batch}", seconds[name], "s", of_peak)
        yield Row(f"{name}, memory of a step", held[name] / 2**30, "GiB", "with weights, gradients and AdamW's state")
    title = f"FPDM against DiT, n = {TRAINING[0]}, m = {TRAINING[1]}"
    yield Row(f"{title}: time", seconds["FPDM"] / seconds["DiT"], "ratio")
    yield Row(f"{title}: memory", held["FPDM"] / held["DiT"], "ratio", f"the paper reports {PAPERS_MEMORY}")


def _inputs(setting: Setting) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    size, device = setting.batch, setting.device
    x = torch.randn(size, 4, 32, 32, device=device, dtype=torch.bfloat16)
    return x, torch.full((size,), 500, device=device), torch.zeros(size, dtype=torch.long, device=device)


def sampling(setting: Setting) -> Iterator[Row]:
    noise, _, labels = _inputs(setting)
    for name, model in networks(setting).items():
        steps, iterations = (2, 2) if setting.smoke else (28, 8) if name == "FPDM" else (10, 0)
        counts = {"iterations": [iterations] * steps, "reuse": True} if name == "FPDM" else {}

        def draw(model: Denoiser = model, steps: int = steps, counts: dict[str, Any] = counts) -> object:
            return sample(model, Diffusion(), noise, labels, num_steps=steps, **counts)

        seconds = min(take_turns({name: draw}, 1 if setting.smoke else 2, setting.device)[name])
        blocks = steps * model.config.blocks(iterations)
        yield Row(f"{name}, bf16", setting.batch / seconds, "samples/s", f"{steps} steps, {blocks} blocks a sample")


def vae(setting: Setting) -> Iterator[Row]:
    from diffusers import AutoencoderKL

    folder = ROOT / ("assets/vae-demo" if setting.smoke else "tests/published/sd-vae-ft-ema")
    network = AutoencoderKL.from_config(json.loads((folder / "config.json").read_text())).to(setting.device)
    side = 32 if setting.smoke else 256
    for dtype in (torch.float32, torch.bfloat16):
        network = network.to(dtype).to(memory_format=torch.channels_last)
        images = torch.zeros(setting.batch, 3, side, side, device=setting.device, dtype=dtype)
        with torch.inference_mode():
            latents = network.encode(images).latent_dist.mean
            calls = {"encoded": partial(network.encode, images), "decoded": partial(network.decode, latents)}
            times = take_turns(calls, 1 if setting.smoke else 3, setting.device)
        for name, seconds in times.items():
            yield Row(f"{name}, {str(dtype).removeprefix('torch.')}", setting.batch / min(seconds), "images/s")


def features(setting: Setting) -> Iterator[Row]:
    from pipeline.features.extractors import EFFICIENTNET, find_extractor_weights, load_extractor

    weights = find_extractor_weights(Evaluate())
    if setting.smoke or not weights.path.is_file():
        weights = find_extractor_weights(Evaluate(feature_extractor=EFFICIENTNET))
    extractor = load_extractor(weights, device=torch.device(setting.device))
    size = 2 if setting.smoke else 128
    images = np.zeros((size, 256, 256, 3), np.uint8)
    seconds = take_turns({"features": lambda: extractor(images)}, 1 if setting.smoke else 3, setting.device)
    yield Row(f"{weights.extractor}, float32", size / min(seconds["features"]), "images/s")


PARTS: dict[str, Callable[[Setting], Iterator[Row]]] = {
    part.__name__: part for part in (golden, zero, compile, resume, training, sampling, vae, features)
}
