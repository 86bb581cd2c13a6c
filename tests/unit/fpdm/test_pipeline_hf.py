"""The diffusers pipeline draws the images of `sample.py`, does what users of diffusers expect, and needs no project."""

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from diffusers.models import AutoencoderDC, AutoencoderKL, AutoencoderRAE, AutoencoderTiny
from torch.testing import assert_close

from common.recipe import Recipe, diffusion
from common.run_folder import RunFolder, SampleFolder, weights_folder
from common.run_weights import load_network
from common.sealed import write_sealed
from fpdm.calibration import fit, fit_start
from fpdm.call_settings import FITTED_WITH
from fpdm.config import DenoiserConfig
from fpdm.denoiser import build_denoiser
from fpdm.diffusion import Diffusion
from fpdm.pipeline_hf import FPDMPipeline
from fpdm.scheduler_hf import FPDMScheduler
from fpdm.transformer_hf import FPDMTransformer2DModel
from pipeline.exporting.export import export
from pipeline.playground.player import Player, Progress
from pipeline.sampling.plans import bind_sampler
from pipeline.sampling.sample_set import sample_set
from preprocess.encoding.encoder import Encoder
from tests.conftest import copied, generated, load_samples
from tests.hub import hub
from tests.seals import resealed

NAMES = {0: "cat, kitty", 1: "dog", 2: "crane"}


def exported(recipe: Recipe) -> FPDMPipeline:
    export(recipe)
    return quiet(FPDMPipeline.from_pretrained(RunFolder(recipe.folder).pipeline))


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pixels(found: Any) -> np.ndarray:
    return np.stack([np.asarray(image) for image in found.images])


@pytest.fixture(scope="module")
def pipeline(tiny_run: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FPDMPipeline]:
    """With class names, DDIM, and guidance off."""
    recipe = copied(tiny_run, tmp_path_factory.mktemp("pipeline") / "runs")
    transformer = FPDMTransformer2DModel.from_pretrained(weights_folder(recipe, 64))
    scheduler = FPDMScheduler(transformer.diffusion, "ddim")
    vae = AutoencoderKL.from_pretrained(recipe.vae.path)
    made = FPDMPipeline(transformer, vae, scheduler, NAMES, {"num_inference_steps": 3, "iterations": 2})
    return quiet(made)


WAYS: dict[str, dict[str, Any]] = {
    "ddpm": {"sampler": "ddpm"},
    "guided": {"sampler": "ddim", "eta": 0.5, "guidance_scale": 1.5, "guidance_rescale": 0.5, "rounding": "truncate"},
    "extrapolated": {"sampler": "multistep", "spacing": "trailing", "order": 3, "start_extrapolation": 0.5},
    "by iterates": {"sampler": "ddim", "iterations": 3, "iterate_guidance": 0.5, "guidance_interval": (0.2, 0.9)},
    "listed": {"sampler": "unipc", "allocation": "list", "iterations": (4, 1, 2), "reuse": "none"},
    "calibrated": {"sampler": "ddim", "allocation": "calibrated", "calibration_samples": 4},
    "without iterations": {
        "sampler": "ddim",
        "allocation": "list",
        "iterations": (2, 0, 1),
        "start_extrapolation": 0.5,
    },
    "until solved": {"sampler": "ddim", "solver": "anderson", "tolerance": 0.05, "iterations": 4},
}


@pytest.mark.parametrize("way", WAYS)
def test_by_default_it_draws_the_recipes_own_samples_pixel_by_pixel(tiny_recipe: Recipe, way: str) -> None:
    recipe = replace(tiny_recipe, sample=replace(tiny_recipe.sample, **WAYS[way]))
    images, labels = load_samples(generated(recipe, "latest"), 10)
    found = exported(recipe)(labels[3:7], seed=recipe.seed, first_index=3)
    assert np.array_equal(pixels(found), images[3:7])


def fitted(recipe: Recipe) -> Recipe:
    """With allocation calibrated, its samples' plan a fitted one: so small a network's fit may not be worth taking."""
    recipe = replace(recipe, sample=replace(recipe.sample, sampler="ddim", allocation="calibrated"))
    samples = sample_set(recipe, "latest")
    model = load_network(samples.weights)

    def bind(index: torch.Tensor) -> Any:
        return bind_sampler(recipe, model, "calibrate", index)

    start = fit_start(diffusion(recipe), 3 * (2 + 2), 2, 2)
    assert start is not None
    limit = bind(torch.arange(4))(**vars(replace(start, iterations=(9,) * 3)))
    samples.folder.mkdir(parents=True)
    way = fit(bind, diffusion(recipe), start, limit, 3)
    write_sealed(SampleFolder(samples.folder).plan, asdict(way))
    return recipe


def test_it_draws_by_the_fitted_sampler_pixel_by_pixel(tiny_recipe: Recipe) -> None:
    recipe = fitted(tiny_recipe)
    images, labels = load_samples(generated(recipe, "latest"), 10)
    loaded = exported(recipe)
    assert loaded.scheduler.sampler == "fitted"
    assert np.array_equal(pixels(loaded(labels[3:7], seed=recipe.seed, first_index=3)), images[3:7])


def test_a_fitted_export_says_its_sampler_and_plays_in_any_number_of_steps(tiny_recipe: Recipe) -> None:
    recipe = fitted(tiny_recipe)
    export(recipe)
    card = (RunFolder(recipe.folder).pipeline / "README.md").read_text()
    assert "| `sampler` | fitted |" in card
    assert "| `coefficients` | fitted |" in card
    player = Player(RunFolder(recipe.folder).pipeline)
    drawn: list[Progress] = []
    player.draw(0, 0, {"num_inference_steps": 5, "iterations": 2}, drawn.append)
    assert [progress.step for progress in drawn] == [1, 2, 3, 4, 5]


def test_latents_are_noised_at_the_timesteps_of_the_scheduler_itself() -> None:
    scheduler = FPDMScheduler(Diffusion(), "multistep")
    scheduler.set_timesteps(5)
    latents, noise = torch.zeros(5, 4, 2, 2), torch.ones(5, 4, 2, 2)
    noised = scheduler.add_noise(latents, noise, scheduler.timesteps)
    assert torch.equal(noised, Diffusion().add_noise(latents, noise, scheduler.timesteps.long()))


def test_a_fitted_sampler_is_exchanged_for_another_by_name(tiny_recipe: Recipe) -> None:
    loaded = exported(fitted(tiny_recipe))
    its_own = {"guidance_interval": (0.0, 1.0)}  # which JSON has as a list
    loaded._check_fitted(dict.fromkeys(FITTED_WITH) | its_own)
    for changed in (
        {"num_inference_steps": 5, "iterations": 2},
        *(
            {"guidance_scale": 2.0},
            {"reuse": False},
            {"block_budget": 20},
            {"solver": "anderson"},
            {"spacing": "trailing"},
        ),
    ):
        with pytest.raises(ValueError, match=r"fitted to its own; pass sampler='multistep' too"):
            loaded([0], **changed)
    assert loaded([0], num_inference_steps=5, iterations=2, sampler="multistep").images
    loaded.scheduler = DPMSolverMultistepScheduler.from_config(loaded.scheduler.config)
    assert loaded([0], num_inference_steps=5, iterations=2).images


def test_a_budget_of_blocks_is_spent_as_the_recipe_spends_it(tiny_recipe: Recipe) -> None:
    sample = replace(tiny_recipe.sample, allocation="more_at_noise", iterations=5)
    recipe = replace(tiny_recipe, sample=sample)
    images, labels = load_samples(generated(recipe, "latest"), 10)
    export(tiny_recipe)
    loaded = quiet(FPDMPipeline.from_pretrained(RunFolder(recipe.folder).pipeline))
    found = loaded(labels, seed=recipe.seed, block_budget=3 * (5 + 2), allocation="more_at_noise")
    assert np.array_equal(pixels(found), images)


def tiny() -> AutoencoderTiny:
    channels = {"encoder_block_out_channels": (8,) * 3, "decoder_block_out_channels": (8,) * 3}
    return AutoencoderTiny(**channels, num_encoder_blocks=(1,) * 3, num_decoder_blocks=(1,) * 3)


def deep() -> AutoencoderDC:
    channels = {"encoder_block_out_channels": (8,) * 3, "decoder_block_out_channels": (8,) * 3}
    layers = {"encoder_layers_per_block": (1,) * 3, "decoder_layers_per_block": (1,) * 3}
    kinds = {"encoder_block_types": ("ResBlock",) * 3, "decoder_block_types": ("ResBlock",) * 3}
    scales = {"encoder_qkv_multiscales": ((),) * 3, "decoder_qkv_multiscales": ((),) * 3}
    return AutoencoderDC(latent_channels=4, scaling_factor=0.41407, **channels, **layers, **kinds, **scales)


@pytest.mark.parametrize("autoencoder", [tiny, deep])
def test_a_run_of_another_kind_of_autoencoder_is_exported_too(tiny_recipe: Recipe, tmp_path: Path, autoencoder) -> None:
    autoencoder().save_pretrained(tmp_path / "vae")
    recipe = replace(tiny_recipe, vae=replace(tiny_recipe.vae, path=str(tmp_path / "vae")))
    images, labels = load_samples(generated(recipe, "latest"), 10)
    assert np.array_equal(pixels(exported(recipe)(labels, seed=recipe.seed)), images)


def test_a_pipeline_decodes_a_representation_autoencoder_as_the_project_does(
    tiny_recipe: Recipe, tmp_path: Path
) -> None:
    sizes = {"encoder_hidden_size": 64, "encoder_patch_size": 4, "encoder_input_size": 16, "patch_size": 8}
    decoder = {"decoder_hidden_size": 16, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 16}
    layers = {"encoder_num_hidden_layers": 1, "decoder_num_hidden_layers": 1}
    statistics = {"latents_mean": [[[0.1]]] * 64, "latents_std": [[[2.0]]] * 64, "scaling_factor": 0.5}
    vae = AutoencoderRAE(**sizes, **decoder, **layers, **statistics).eval()
    vae.save_pretrained(tmp_path / "vae")
    pipeline = FPDMPipeline(FPDMTransformer2DModel.from_pretrained(weights_folder(tiny_recipe, 64)), vae, None)
    latents = torch.randn(2, 64, 4, 4, generator=torch.Generator().manual_seed(0))
    encoder = Encoder(replace(tiny_recipe.vae, path=str(tmp_path / "vae"), latent_channels=64, downsampling=8))
    with torch.no_grad():
        found = pipeline.decode_latents(latents, "pt", "half_away")
    torch.testing.assert_close(found, encoder.decode(latents) / 2 + 0.5, rtol=1e-5, atol=1e-6)


ALONE = """
import sys
import numpy as np, torch
sys.path[:] = [place for place in sys.path if place not in ({root!r}, "")]
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("fpdm", "common", "pipeline", "preprocess", "slurm"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
def images(folder):
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    drawn = pipeline([0, 1, 2, 0], seed=0).images
    return pipeline, np.stack([np.asarray(image) for image in drawn])
pipeline, drawn = images({export!r})
np.save({found!r}, drawn)
again, same = images("me/tiny")  # from the hub
assert (same == drawn).all() and (np.asarray(pipeline(0, seed=0).images[0]) == drawn[0]).all()
pipeline.save_pretrained({copy!r})
assert (images({copy!r})[1] == drawn).all()
again.scheduler = EulerDiscreteScheduler.from_config(again.scheduler.config)
assert again(0, num_inference_steps=2).images
assert not [name for name in sys.modules if name.partition(".")[0] == "fpdm"]
"""


def test_an_export_loads_and_draws_the_same_where_there_is_no_project(tiny_recipe: Recipe, tmp_path: Path) -> None:
    images, _ = load_samples(generated(tiny_recipe, "latest"), 10)
    export(tiny_recipe)
    root, found = Path(__file__).parents[3], tmp_path / "found.npy"
    program = ALONE.format(
        root=str(root),
        export=str(RunFolder(tiny_recipe.folder).pipeline),
        found=str(found),
        copy=str(tmp_path / "copy"),
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", program]
    with hub(RunFolder(tiny_recipe.folder).pipeline) as address:
        environment |= {"HF_HOME": str(tmp_path / "hub"), "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "Expected types" not in done.stderr
    assert np.array_equal(np.load(found), images[[0, 1, 2, 3]])


def test_the_code_of_an_export_is_not_run_where_the_project_is_installed(tiny_recipe: Recipe) -> None:
    export(tiny_recipe)
    folder = RunFolder(tiny_recipe.folder).pipeline
    for path in folder.rglob("pipeline.py"):
        path.write_text("raise SystemExit('run')")
    assert type(FPDMPipeline.from_pretrained(folder)) is FPDMPipeline


def test_it_has_all_of_dit_pipelines_signature(pipeline: FPDMPipeline) -> None:
    theirs, ours = (inspect.signature(kind.__call__).parameters for kind in (DiTPipeline, FPDMPipeline))
    assert list(ours)[: len(theirs)] == list(theirs)  # in the same places
    assert {"latents", "callback_on_step_end", "callback_on_step_end_tensor_inputs", "eta"} <= ours.keys()
    theirs, ours = (inspect.signature(kind.__init__).parameters for kind in (DiTPipeline, FPDMPipeline))
    assert list(ours)[: len(theirs)] == list(theirs)
    assert pipeline.components.keys() == {"transformer", "vae", "scheduler"}
    assert pipeline.model_cpu_offload_seq == DiTPipeline.model_cpu_offload_seq
    assert {name for name in vars(DiTPipeline) if not name.startswith("_")} <= set(dir(pipeline))
    stated = pipeline.transformer.config
    assert (stated.sample_size, stated.in_channels, stated.out_channels) == (4, 4, 4)


def test_dit_pipeline_runs_on_the_exported_parts(pipeline: FPDMPipeline) -> None:
    dit = quiet(DiTPipeline(pipeline.transformer, pipeline.vae, pipeline.scheduler))
    start = torch.randn(2, 4, 4, 4, generator=torch.manual_seed(3))
    theirs = dit([0, 2], 1.0, torch.manual_seed(3), 3, "np").images
    ours = pipeline([0, 2], latents=start, iterations=8, reuse=False, output_type="np").images
    assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_classes_are_given_by_number_or_name_one_or_many(pipeline: FPDMPipeline) -> None:
    drawn = {
        tuple(map(str, np.atleast_1d(given))): pixels(pipeline(given, seed=0)) for given in (1, "dog", ["dog"], [1])
    }
    first, *others = drawn.values()
    assert all(np.array_equal(first, other) for other in others)
    mixed = pipeline(["kitty", 1, np.int64(2)], seed=0)
    assert np.array_equal(pixels(mixed), pixels(pipeline(torch.tensor([0, 1, 2]), seed=0)))
    assert pipeline.labels == {"cat": 0, "crane": 2, "dog": 1, "kitty": 0}
    assert pipeline.get_label_ids(["dog", "cat"]) == [1, 0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 3], r"class_labels: 3, which is the null label; the classes are 0\.\.2"),
        (-1, r"class_labels: -1; the classes are 0\.\.2"),
        ("horse", r"class_labels: no class is named 'horse'; there are cat, crane, dog, kitty"),
        ([True], "class_labels: 'True' is neither a number nor a name"),
        ([], "class_labels: none"),
        ([0.5], "class_labels: '0.5' is neither a number nor a name"),
    ],
)
def test_what_is_no_class_is_refused(pipeline: FPDMPipeline, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline(labels)


def test_a_name_of_two_classes_is_refused(pipeline: FPDMPipeline) -> None:
    double = FPDMPipeline(**pipeline.components, id2label={"0": "crane, bird", "1": "crane"})
    assert double.get_label_ids("bird") == [0]
    with pytest.raises(ValueError, match="'crane' names the classes 0, 1; give a number"):
        double.get_label_ids("crane")
    with pytest.raises(ValueError, match="id2label: 7; the classes are"):
        FPDMPipeline(**pipeline.components, id2label={7: "x"})


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_generators_make_a_call_repeatable_image_by_image(pipeline: FPDMPipeline, sampler: Any) -> None:
    def draw(labels: list[int], generator: Any = None) -> torch.Tensor:
        return pipeline(labels, generator=generator, sampler=sampler, output_type="latent").images

    one = draw([0, 1], torch.Generator().manual_seed(5))
    assert_close(draw([0, 1], torch.Generator().manual_seed(5)), one, rtol=0, atol=0)
    several = draw([0, 1], [torch.Generator().manual_seed(seed) for seed in (6, 7)])
    assert_close(draw([1], [torch.Generator().manual_seed(7)]), several[1:], rtol=0, atol=1e-5)
    assert not torch.equal(draw([0, 1]), draw([0, 1]))
    torch.manual_seed(1)
    first = draw([0])
    torch.manual_seed(1)
    assert torch.equal(draw([0]), first)


def test_the_forms_of_the_output_are_of_one_image(pipeline: FPDMPipeline) -> None:
    latents = pipeline([0, 1], seed=0, output_type="latent").images
    tensors, arrays = (pipeline([0, 1], seed=0, output_type=form).images for form in ("pt", "np"))
    assert latents.shape == (2, 4, 4, 4)
    assert tensors.shape == (2, 3, 16, 16)
    assert np.array_equal(tensors.permute(0, 2, 3, 1).numpy(), arrays)
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents).sample  # whose scaling factor is 1
    assert_close((decoded / 2 + 0.5).clamp(0, 1), tensors)
    assert np.abs(pixels(pipeline([0, 1], seed=0)) / 255 - arrays).max() <= 0.5 / 255 + 1e-6
    assert len(pipeline([0], seed=0, return_dict=False)) == 1


def test_a_callback_sees_and_changes_every_step_and_may_stop(pipeline: FPDMPipeline) -> None:
    seen: list[tuple[int, float]] = []

    def callback(which: Any, step: int, timestep: torch.Tensor, given: dict[str, torch.Tensor]) -> dict[str, Any]:
        assert which is pipeline
        seen.append((step, float(timestep)))
        return {"latents": 2 * given["latents"]} if step == 2 else {}

    plain = pipeline([0], seed=0, output_type="latent").images
    found = pipeline([0], seed=0, callback_on_step_end=callback, output_type="latent").images
    assert seen == [(0, 999.0), (1, 500.0), (2, 0.0)]
    assert torch.equal(found, 2 * plain)

    def stop(which: Any, step: int, timestep: torch.Tensor, given: dict[str, torch.Tensor]) -> dict[str, Any]:
        which._interrupt = True
        seen.append((step, float(timestep)))
        return given

    del seen[:]
    assert pipeline([0], seed=0, callback_on_step_end=stop).images
    assert len(seen) == 1
    assert pipeline([0], seed=0).images  # and is asked anew in the next call


def test_a_callback_may_change_the_latents_in_place_whichever_scheduler_there_is(pipeline: FPDMPipeline) -> None:
    def wipe(_: Any, step: int, _timestep: torch.Tensor, given: dict[str, torch.Tensor]) -> dict[str, Any]:
        given["latents"].mul_(0 if step == 0 else 1)
        return given

    def give(_: Any, step: int, _timestep: torch.Tensor, given: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {"latents": given["latents"] * (0 if step == 0 else 1)}

    for scheduler in (pipeline.scheduler, EulerDiscreteScheduler.from_config(pipeline.scheduler.config)):
        own = quiet(FPDMPipeline(**{**pipeline.components, "scheduler": scheduler}))
        in_place, anew = (
            own([0], seed=0, num_inference_steps=3, callback_on_step_end=callback, output_type="latent").images
            for callback in (wipe, give)
        )
        assert torch.equal(in_place, anew)


def test_another_scheduler_is_taken_and_is_told_of_the_process(pipeline: FPDMPipeline) -> None:
    own = FPDMPipeline.from_pipe(pipeline)
    quiet(own)
    named = own([0, 1], seed=0, sampler="dpm++", num_inference_steps=5, output_type="latent").images
    own.scheduler = DPMSolverMultistepScheduler.from_config(own.scheduler.config)
    taken = own([0, 1], seed=0, num_inference_steps=5, output_type="latent").images
    assert_close(taken, named)
    own.scheduler = EulerDiscreteScheduler.from_config(own.scheduler.config)  # of another scale, with sigmas
    euler = own([0, 1], seed=0, num_inference_steps=5, output_type="latent").images
    ddim = pipeline([0, 1], seed=0, num_inference_steps=5, output_type="latent").images
    assert_close(euler, ddim, rtol=0, atol=0.02)
    own.scheduler = EulerAncestralDiscreteScheduler.from_config(own.scheduler.config)
    noisy = [own([0], generator=torch.manual_seed(seed), output_type="latent").images for seed in (1, 1, 2)]
    assert torch.equal(noisy[0], noisy[1])
    assert not torch.equal(noisy[0], noisy[2])
    for argument in ({"sampler": "ddim"}, {"order": 3}, {"eta": 0.5}):
        with pytest.raises(ValueError, match=f"{next(iter(argument))}: .*EulerAncestral"):
            own([0], **argument)
    own.scheduler = FPDMScheduler.from_config(own.scheduler.config)
    assert torch.equal(own([0, 1], seed=0, num_inference_steps=5, output_type="latent").images, ddim)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "prediction_type 'epsilon', the network 'v_prediction'; make it of the export's"),
        ({"prediction_type": "v_prediction", "num_train_timesteps": 500}, "num_train_timesteps 500, the network 1000"),
        ({"prediction_type": "v_prediction"}, "other betas than the network was trained with"),
    ],
)
def test_a_scheduler_of_another_process_is_refused(pipeline: FPDMPipeline, changes: Any, message: str) -> None:
    other = FPDMPipeline(**{**pipeline.components, "scheduler": DDIMScheduler(**changes)})
    with pytest.raises(ValueError, match=message):
        other([0], num_inference_steps=2)


def test_a_scheduler_that_cannot_start_at_pure_noise_is_refused(pipeline: FPDMPipeline) -> None:
    scheduler = HeunDiscreteScheduler.from_config(pipeline.scheduler.config)
    heun = FPDMPipeline(**{**pipeline.components, "scheduler": scheduler})
    with pytest.raises(ValueError, match="HeunDiscreteScheduler has infinite sigmas"):
        heun([0], num_inference_steps=3)


def test_a_scheduler_of_two_evaluations_a_step_has_iterations_for_each(pipeline: FPDMPipeline) -> None:
    transformer = FPDMTransformer2DModel(pipeline.transformer.denoiser, Diffusion(learned_variance=False))
    scheduler = HeunDiscreteScheduler.from_config(FPDMScheduler(transformer.diffusion, "ddim").config)
    heun = quiet(FPDMPipeline(**{**pipeline.components, "scheduler": scheduler, "transformer": transformer}))
    calls: list[int] = []
    heun([0], num_inference_steps=3, iterations=1, callback_on_step_end=lambda *given: calls.append(given[1]) or {})
    assert calls == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"iterations": 2, "block_budget": 12}, "give exactly one"),
        ({"block_budget": 3}, "block_budget: 3 is too small"),
        ({"allocation": "calibrated"}, "allocation: 'calibrated' is measured on the weights"),
        ({"eta": 0.5, "sampler": "ddpm"}, "eta: 0.5 is of samplers ddim and multistep"),
        ({"seed": 1, "generator": torch.Generator()}, "seed: together with a generator"),
        ({"generator": [torch.Generator()] * 3}, "generator: 3 for 1 images"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"latents: \(1, 4, 8, 8\) do not fit, \(1, 4, 4, 4\)"),
        ({"output_type": "jpeg"}, "output_type: 'jpeg' is unknown; choose one of pil, np, pt, latent"),
        ({"guidance_rescale": 0.5}, "guidance_rescale: there is no guidance"),
        ({"weak_iterate": 2}, "weak_iterate: it belongs to iterate_guidance"),
        ({"reuse": False, "start_extrapolation": 0.5}, "start_extrapolation: it moves starts that reuse gives"),
        ({"iterate_guidance": 0.5, "tolerance": 0.1}, "iterate_guidance: reads an iterate of fixed counts"),
        ({"callback_on_step_end_tensor_inputs": ["x"]}, "callback_on_step_end_tensor_inputs: no 'x'"),
    ],
)
def test_arguments_that_do_not_fit_or_act_on_nothing_are_refused(
    pipeline: FPDMPipeline, argument: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline([0], **argument)


def test_measured_iterations_are_not_stretched_to_other_steps(tiny_recipe: Recipe) -> None:
    sample = replace(tiny_recipe.sample, sampler="ddim", allocation="adaptive", calibration_samples=4)
    loaded = exported(replace(tiny_recipe, sample=sample))
    with pytest.raises(ValueError, match=r"num_inference_steps: 5, but .* measured for 3 steps; pass iterations too"):
        loaded([0], num_inference_steps=5)
    assert loaded([0], num_inference_steps=5, iterations=2).images


def test_a_dit_has_no_iterations_to_set(pipeline: FPDMPipeline) -> None:
    network = build_denoiser(
        DenoiserConfig(kind="dit", depth=2, hidden_size=16, num_heads=2, input_size=4, num_classes=3)
    )
    dit = quiet(FPDMPipeline(FPDMTransformer2DModel(network, Diffusion()), pipeline.vae, None))
    assert dit([0], num_inference_steps=2).images
    with pytest.raises(ValueError, match="iterations: this network is a DiT"):
        dit([0], iterations=2)


def test_it_runs_in_half_precision_in_slices_and_from_variants(pipeline: FPDMPipeline, tmp_path: Path) -> None:
    whole = pixels(pipeline([0, 1], seed=0))
    pipeline.enable_vae_slicing()
    assert np.array_equal(pixels(pipeline([0, 1], seed=0)), whole)
    pipeline.disable_vae_slicing()
    pipeline.save_pretrained(tmp_path)
    half = quiet(FPDMPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16))
    assert {parameter.dtype for parameter in half.transformer.parameters()} == {torch.bfloat16}
    assert np.abs(pixels(half([0, 1], seed=0)).astype(int) - whole).mean() < 8
    assert half.to(torch.float32).transformer.dtype == torch.float32
    half.to(torch.bfloat16).save_pretrained(tmp_path, variant="bf16")
    written = {path.name for path in (tmp_path / "transformer").iterdir()}
    assert {"diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bf16.safetensors"} <= written
    again = quiet(FPDMPipeline.from_pretrained(tmp_path, variant="bf16", torch_dtype=torch.bfloat16))
    assert np.array_equal(pixels(again([0, 1], seed=0)), pixels(half([0, 1], seed=0)))
    assert np.array_equal(pixels(quiet(FPDMPipeline.from_pretrained(tmp_path))([0, 1], seed=0)), whole)
    path = tmp_path / "transformer" / "diffusion_pytorch_model.bf16.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"bf16\.safetensors: changed after it was written"):
        FPDMPipeline.from_pretrained(tmp_path, variant="bf16")


def test_the_network_is_called_through_its_module_so_that_offloading_hooks_run(pipeline: FPDMPipeline) -> None:
    calls: list[int] = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    pipeline([0], seed=0)
    hook.remove()
    assert len(calls) == 3


def test_the_transformer_is_a_model_of_diffusers(pipeline: FPDMPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    loaded = FPDMTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer")
    assert loaded.config.extra == pipeline.transformer.config.extra
    x, t, y = torch.ones(2, 4, 4, 4), torch.tensor([5, 900]), torch.tensor([0, 2])
    output = loaded(x, timestep=t, class_labels=y)
    assert torch.equal(output.sample, pipeline.transformer(x, t, y, iterations=8, return_dict=False)[0])
    made = [FPDMTransformer2DModel.from_config(loaded.config, seed=seed) for seed in (1, 1, 2)]
    read = FPDMTransformer2DModel.from_config(FPDMTransformer2DModel.load_config(tmp_path, subfolder="transformer"))
    assert read.diffusion == made[0].diffusion == loaded.diffusion
    weights = [next(iter(model.parameters())) for model in made]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert FPDMTransformer2DModel.from_config(loaded.config, hidden_size=32).config.hidden_size == 32
    with pytest.raises(ValueError, match="depths: no setting of the network"):
        FPDMTransformer2DModel.from_config(loaded.config, depths=3)
    with pytest.raises(ValueError, match="device_map: not supported"):
        FPDMTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer", device_map="auto")


def test_the_scheduler_steps_in_order_alone(pipeline: FPDMPipeline) -> None:
    scheduler, x = FPDMScheduler.from_config(pipeline.scheduler.config, sampler="ddpm"), torch.ones(1, 4, 4, 4)
    assert scheduler.settings.spacing == "linspace"
    with pytest.raises(ValueError, match="timestep: 0 is not the next; call set_timesteps"):
        scheduler.step(x, 0, x)
    scheduler.set_timesteps(2)
    first = scheduler.step(x, scheduler.timesteps[0], x, torch.manual_seed(0)).prev_sample
    with pytest.raises(ValueError, match="timestep: 999 is not the next"):
        scheduler.step(x, scheduler.timesteps[0], first)
    with pytest.raises(ValueError, match="config: of another scheduler"):
        FPDMScheduler.from_config(DDIMScheduler().config)
    with pytest.raises(ValueError, match="spaces: no setting of a sampler"):
        scheduler.changed(spaces=3)


def test_guidance_by_a_network_that_never_saw_the_null_label_is_refused_also_after_an_export(
    tiny_recipe: Recipe,
) -> None:
    resealed(weights_folder(tiny_recipe, 64) / "config.json", lambda stated: stated["extra"].update(label_dropout=0))
    loaded = exported(tiny_recipe)
    with pytest.raises(ValueError, match=r"guidance_scale: 1\.5, but .* never saw the null label"):
        loaded([0], num_inference_steps=2, iterations=1, guidance_scale=1.5)
    assert loaded([0], num_inference_steps=2, iterations=1).images


def test_an_autoencoder_that_scales_by_channel_is_refused(tiny_recipe: Recipe) -> None:
    transformer = FPDMTransformer2DModel.from_pretrained(weights_folder(tiny_recipe, 64))
    vae = AutoencoderKL.from_pretrained(tiny_recipe.vae.path, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    with pytest.raises(ValueError, match="vae: scaling by channel"):
        FPDMPipeline(transformer, vae, None)


def test_weights_without_an_objective_are_refused(tiny_recipe: Recipe) -> None:
    path = weights_folder(tiny_recipe, 64) / "config.json"
    resealed(path, lambda config: {name: value for name, value in config.items() if name != "extra"})
    with pytest.raises(ValueError, match=r"config\.json has no extra\.objective"):
        FPDMTransformer2DModel.from_pretrained(path.parent)


def test_an_exported_pipeline_needs_nothing_but_fpdm(tiny_recipe: Recipe) -> None:
    export(tiny_recipe)
    program = (
        "import sys; from fpdm.pipeline_hf import FPDMPipeline;"
        f"pipeline = FPDMPipeline.from_pretrained({str(RunFolder(tiny_recipe.folder).pipeline)!r});"
        "pipeline([0], num_inference_steps=2, iterations=1);"
        "assert not {'pipeline', 'preprocess', 'common', 'slurm'} & set(sys.modules)"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr


def test_settings_of_another_version_are_refused(pipeline: FPDMPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "sampling": {"steps": 3}}))
    with pytest.raises(ValueError, match=r"sampling: .*steps.*another version"):
        FPDMPipeline.from_pretrained(tmp_path)
