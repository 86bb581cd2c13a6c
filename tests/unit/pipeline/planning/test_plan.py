"""What a run will take is counted before it begins, from the recipe alone or from a moment of its own work."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.gpus import GPUS, Model, named
from common.loading import load_recipe, parse_recipe
from common.recipe import Recipe, denoiser_config
from fpdm.config import DenoiserConfig
from fpdm.denoiser import build_denoiser, count_parameters
from pipeline.planning.disk import checkpoint_bytes, disk, saves
from pipeline.planning.estimate import Speeds, computed, sampling_flops, stage_times
from pipeline.planning.memory import Activations, bytes_a_parameter
from pipeline.planning.page import plan_page
from pipeline.stages import select
from pipeline.training.identity import crosses, total_samples
from tests.conftest import generated

ROOT = Path(__file__).parents[4]


def demo(*overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes/demo.yaml", overrides)


@pytest.mark.parametrize("total", [4096, 65536, 65600, 229376])
def test_as_many_checkpoints_are_counted_as_training_writes(total: int) -> None:
    recipe = demo(f"train.total_samples={total}")
    batch, every = recipe.train.batch_size, recipe.train.checkpoint.every_samples
    ends = range(batch, total_samples(recipe.train) + 1, batch)
    assert saves(recipe.train) == sum(end == ends[-1] or crosses(end - batch, end, every) for end in ends)


def test_weights_and_samples_take_the_counted_bytes(tiny_recipe: Recipe) -> None:
    samples = generated(tiny_recipe)
    written = sum(path.stat().st_size for path in samples.glob("chunk-*"))
    counted = disk(replace(tiny_recipe, train=replace(tiny_recipe.train, total_samples=64)), 100)
    assert counted["samples"] > written > 0.5 * 10 * 3 * 16**2
    weights = sum(path.stat().st_size for path in (tiny_recipe.folder / "weights").rglob("*.safetensors"))
    assert weights == pytest.approx(counted["weights"], rel=0.3)  # of so small a network names take their part
    assert checkpoint_bytes(tiny_recipe) == 4 * 4 * count_parameters(denoiser_config(tiny_recipe))


def test_activations_grow_with_iterations_and_shrink_where_they_are_recomputed() -> None:
    config = DenoiserConfig(hidden_size=64, num_heads=2, input_size=8)
    kept = [Activations(config, 64, count, recomputed=False).bytes for count in (1, 2, 3)]
    assert kept[2] - kept[1] == pytest.approx(kept[1] - kept[0], rel=0.02)
    assert kept[1] > kept[0]
    assert Activations(config, 64, 3, recomputed=True).bytes < kept[2]


@pytest.mark.parametrize(("intermediate", "with_growth"), [(False, False), (True, False), (False, True)])
def test_activations_are_those_that_autograd_keeps(intermediate: bool, with_growth: bool) -> None:
    config = DenoiserConfig(hidden_size=64, num_heads=2, input_size=8)
    model, kept = build_denoiser(config, seed=0), {}
    own = {parameter.data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        zero, options = (
            torch.zeros(4, dtype=torch.long),
            {"intermediate": int(intermediate), "with_growth": with_growth},
        )
        model(torch.zeros(4, 4, 8, 8), zero, zero, iterations=(0, 2), **options)
    stored = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    counted = Activations(config, 4, 2, False, intermediate, with_growth, dtype=torch.float32)
    assert counted.bytes == pytest.approx(stored, rel=0.05)


def test_zero_divides_what_belongs_to_a_parameter() -> None:
    def of(stage: int, precision: str = "bf16", ranks: int = 8) -> float:
        return bytes_a_parameter(
            demo("train.contraction=0", f"train.zero_stage={stage}", f"train.precision={precision}").train, ranks
        )

    assert [of(stage) for stage in range(4)] == [20.0, 4 + 2.0, 2 + 2 / 8 + 2, 20 / 8]
    assert of(2, "fp32", ranks=1) == 20.0  # one rank in fp32 keeps no second copy of the weights


def test_a_gpus_speed_divides_the_operations() -> None:
    recipe = demo("launch.processes=4", "train.contraction=0", "train.precision=auto")
    slow, fast = (computed(recipe, gpu) for gpu in (replace(GPUS["a100"], tflops=100), GPUS["a100"]))
    assert fast.training == pytest.approx(3.12 * slow.training)
    dit = demo("model.kind=dit", "train.gradient=sjfb", "train.contraction=0", "sample.start_extrapolation=0")
    assert sampling_flops(dit) > sampling_flops(recipe)


def test_stages_share_their_work_among_their_processes() -> None:
    recipe = demo("launch.processes=4")
    speeds = Speeds(training=10.0, encoding=0.1, sampling=1.0, evaluation=0.1)
    times = stage_times(recipe, 1000, speeds, select(recipe, None), "local")
    assert (times["train"].devices, times["encode"].devices) == (4, 1)
    assert times["sample"].device_hours == pytest.approx(4 * times["sample"].seconds / 3600)
    assert times["encode"].seconds == pytest.approx(100, abs=20)
    unknown = stage_times(recipe, 1000, Speeds(), select(recipe, None), "local")
    assert unknown["train"].seconds is None


def test_a_page_says_which_speed_it_lacks() -> None:
    recipe = parse_recipe(
        "name: a\ndata: {source: imagenet, images: none}\nmodel: {num_classes: 1000}", ["launch.gpus_per_process=1"]
    )
    page = list(plan_page(recipe, select(recipe, "train"), "slurm", measure=True))
    assert page[-1].startswith("time: not known here; launch.gpu says for which GPU it is computed: b200, h200")
    assert "images: 1,281,167 in 1,000 classes" in "\n".join(page)


def test_devices_are_known_by_torchs_names() -> None:
    assert set(GPUS) == set(Model.__args__)
    names = ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "Tesla V100-SXM2-32GB", "NVIDIA GeForce RTX 3060", None)
    assert [gpu and gpu.name for gpu in map(named, names)] == ["H100", "H100 PCIe", "V100", None, None]
