"""Autoencoders as they are published: read through diffusers, checked against the recipe, refused by name."""

import fnmatch
import hashlib
import importlib.util
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import models
from safetensors.torch import load_file, save_file

from common.errors import UserError
from common.recipe import VAE
from fpdm.latents import draw_latents
from preprocess.encoding.encoder import Encoder, check_side, fetch_vae, find_vae, identify, load_vae

PUBLISHED = Path(__file__).parents[3] / "published"
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
# Scaling factor, shift factor, latent channels, downsampling.
FACTS = {
    "sd-vae-ft-ema": (0.18215, 0.0, 4, 8),
    "sd-vae-ft-mse": (0.18215, 0.0, 4, 8),
    "DiT-XL-2-256/vae": (0.18215, 0.0, 4, 8),
    "sdxl-vae": (0.13025, 0.0, 4, 8),
    "sdxl-vae-fp16-fix": (0.13025, 0.0, 4, 8),
    "stable-diffusion-3-medium/vae": (1.5305, 0.0609, 16, 8),
    "FLUX.1-schnell/vae": (0.3611, 0.1159, 16, 8),
    "dc-ae-f32c32-sana-1.0": (0.41407, 0.0, 32, 32),
    "dc-ae-f32c32-in-1.0": (0.3189, 0.0, 32, 32),
    "taesd": (1.0, 0.0, 4, 8),
}


def configuration(name: str) -> dict[str, Any]:
    return json.loads((PUBLISHED / name / "config.json").read_text())


def network_of(config: dict[str, Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(models, config["_class_name"]).from_config(config).eval()


def narrow(config: dict[str, Any]) -> dict[str, Any]:
    """The same configuration with few channels and layers, for weights that are made in a moment."""
    width = 32 if config["_class_name"] == "AutoencoderDC" else 8  # at least as many as the latents have
    widths = {name: [width for _ in value] for name, value in config.items() if name.endswith("block_out_channels")}
    lists = {name: value for name, value in config.items() if isinstance(value, list)}
    layers = {name: [min(count, 1) for count in lists[name]] for name in lists if "layers_per" in name}
    counts = {name: [1 for _ in lists[name]] for name in lists if name.startswith("num_")}
    fixed = {"norm_num_groups": 4, "attention_head_dim": 4, "layers_per_block": 1}
    return {**config, **widths, **layers, **counts, **{name: fixed[name] for name in fixed if name in config}}


def written(folder: Path, config: dict[str, Any], **changed: Any) -> Path:
    """A folder with a configuration, as given, and random weights of its shape."""
    folder.mkdir(parents=True)
    save_file(network_of(config).state_dict(), folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps({**config, **changed}))
    return folder


@pytest.fixture
def narrow_vae(tmp_path: Path) -> Path:
    return written(tmp_path / "vae", narrow(configuration("sd-vae-ft-ema")))


def settings(folder: Path, channels: int = 4, downsampling: int = 8, **others: Any) -> VAE:
    return VAE(path=str(folder), latent_channels=channels, downsampling=downsampling, **others)


def test_the_published_file_is_the_published_one() -> None:
    content = (PUBLISHED / "sd-vae-ft-ema/config.json").read_bytes()
    assert hashlib.sha256(content).hexdigest() == "92d3dfb746fca211a2c9e019e285f8597412211728dce3c5bcf4eda0f2d62e7e"
    assert b"scaling_factor" not in content


@pytest.mark.parametrize("name", FACTS)
def test_published_configurations_are_read_as_by_diffusers(tmp_path: Path, name: str) -> None:
    """At its real size: scaling and shapes are those of the network that diffusers builds."""
    scaling, shift, channels, downsampling = FACTS[name]
    shutil.copytree(PUBLISHED / name, tmp_path / "vae")
    (tmp_path / "vae" / WEIGHTS).write_bytes(b"")
    identity = identify(tmp_path / "vae", settings(tmp_path / "vae", channels, downsampling))
    assert (identity.scaling_factor, identity.shift_factor) == (scaling, shift)
    with torch.device("meta"):
        network = network_of(configuration(name))
        assert network.config.scaling_factor == scaling
        assert (network.config.get("shift_factor") or 0.0) == shift
        latents = network.encode(torch.empty(1, 3, 4 * downsampling, 8 * downsampling))
        latents = latents.latent_dist.mean if hasattr(latents, "latent_dist") else latents[0]
        assert latents.shape == (1, channels, 4, 8)
        assert network.decode(latents).sample.shape == (1, 3, 4 * downsampling, 8 * downsampling)


@pytest.mark.parametrize("name", FACTS)
def test_every_published_kind_encodes_and_decodes_as_diffusers_does(tmp_path: Path, name: str) -> None:
    scaling, shift, channels, downsampling = FACTS[name]
    folder = written(tmp_path / "vae", narrow(configuration(name)))
    encoder, network = Encoder(settings(folder, channels, downsampling)), network_of(narrow(configuration(name)))
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moments = encoder.encode(images)
    with torch.no_grad():
        output = network.encode(images)
        if hasattr(output, "latent_dist"):
            mean, std = output.latent_dist.mean, output.latent_dist.std
        else:
            mean, std = output[0], torch.zeros_like(output[0])
        torch.testing.assert_close(moments, torch.cat([mean, std], dim=1))
        near = {"rtol": 1e-4, "atol": 1e-4}
        latents = draw_latents(moments, torch.zeros_like(mean), scaling, shift)
        torch.testing.assert_close(encoder.decode(latents), network.decode(mean).sample.clamp(-1, 1), **near)


def test_the_demos_autoencoder_is_known_as_before() -> None:
    """Shards record this; another value would refuse those that are there."""
    folder = Path(__file__).parents[4] / "assets/vae-demo"
    assert asdict(identify(folder, VAE(path=str(folder), downsampling=4))) == {
        "config_sha256": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
        "weights_sha256": hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest(),
        "scaling_factor": 0.99928,
        "shift_factor": -0.00601,
    }


REPRESENTATION = {
    "_class_name": "AutoencoderRAE",
    **{"encoder_hidden_size": 64, "encoder_patch_size": 4, "encoder_num_hidden_layers": 1, "encoder_input_size": 16},
    **{"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2},
    **{"decoder_intermediate_size": 16, "patch_size": 8, "scaling_factor": 0.5},
    **{"latents_mean": [[[0.1]]] * 64, "latents_std": [[[2.0]]] * 64},
}


@pytest.mark.parametrize("kind", ["dinov2", "mae"])  # siglip2 diffusers 0.42.1 cannot build with transformers 5.24
def test_a_representation_autoencoder_gets_images_as_it_was_trained_and_scales_by_itself(
    tmp_path: Path, kind: str
) -> None:
    config = {**REPRESENTATION, "encoder_type": kind}
    folder, network = written(tmp_path / "vae", config), network_of(config)
    encoder = Encoder(settings(folder, 64))
    assert (encoder.identity.scaling_factor, encoder.identity.shift_factor) == (1.0, 0.0)
    check_side(settings(folder, 64), 32)
    told = r"^data\.resolution: 64, but the autoencoder in .* takes images of 32 pixels alone; set it to that, or"
    with pytest.raises(UserError, match=told):
        check_side(settings(folder, 64), 64)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    moments = encoder.encode(images * 2 - 1)
    with torch.no_grad():
        latents = network.encode(images).latent
        torch.testing.assert_close(moments, torch.cat([latents, torch.zeros_like(latents)], dim=1))
        decoded = network.decode(latents).sample
    torch.testing.assert_close(encoder.decode(moments[:, :64]), (decoded * 2 - 1).clamp(-1, 1), rtol=1e-4, atol=1e-4)


def test_a_representation_autoencoder_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path / "vae", REPRESENTATION)
    with pytest.raises(UserError, match=r"vae\.latent_channels: 4 in the recipe, but 64 in"):
        identify(folder, settings(folder))
    for changed in ({"encoder_patch_size": 0}, {"reshape_to_2d": False}, {"num_channels": 1}, {"patch_size": "8"}):
        (folder / "config.json").write_text(json.dumps({**REPRESENTATION, **changed}))
        with pytest.raises(UserError, match="no AutoencoderRAE of RGB images"):
            identify(folder, settings(folder, 64))
    (folder / "config.json").write_text(json.dumps({**REPRESENTATION, "scaling_factor": 0}))
    with pytest.raises(UserError, match=r"scaling_factor 0 .* above 0"):
        identify(folder, settings(folder, 64))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"transformers, which is not installed; pip install -e '\.\[rae\]'$"):
        identify(folder, settings(folder, 64))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scaling_factor": float("nan")}, "scaling_factor nan .* is not a finite number"),
        ({"scaling_factor": float("inf")}, "scaling_factor inf .* is not a finite number"),
        ({"scaling_factor": 0}, "scaling_factor 0 .* above 0"),
        ({"scaling_factor": -0.18215}, "scaling_factor -0.18215 .* above 0"),
        ({"scaling_factor": "0.18215"}, "scaling_factor '0.18215' .* is not a finite number"),
        ({"scaling_factor": None}, "scaling_factor None .* is not a finite number"),
        ({"scaling_factor": True}, "scaling_factor True .* is not a finite number"),
        ({"scaling_factor": "x"}, "scaling_factor 'x' .* is not a finite number"),
        ({"scaling_factor": 10**4000}, "scaling_factor 1000000000.*00000 .* is not a finite number"),
        ({"scaling_factor": 1e-400}, "scaling_factor 0.0 .* above 0"),
        ({"scaling_factor": [0.18215]}, "scaling_factor .0.18215. .* is not a finite number"),
        ({"shift_factor": "0"}, "shift_factor '0' .* is not a finite number"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, r"scaling by channel \(latents_mean"),
        ({"latents_std": [1.0] * 4}, r"scaling by channel \(latents_std"),
        ({"in_channels": 2}, "is no VAE of RGB images"),
        ({"block_out_channels": 128}, "is no VAE of RGB images"),
        ({"block_out_channels": [1] * 20_000}, "is no VAE of RGB images"),
        ({"_class_name": "AutoencoderKLWan"}, "is an AutoencoderKLWan; .* AutoencoderKL, .* can be read"),
        ({"_class_name": None}, "says not which class of diffusers it is of; add"),
        ({"latent_channels": 8}, r"vae\.latent_channels: 4 in the recipe, but 8 in .*; set it to that"),
    ],
)  # fmt: skip
def test_impossible_configurations_are_rejected(tmp_path: Path, narrow_vae: Path, changed, message) -> None:
    config = {**json.loads((narrow_vae / "config.json").read_text()), **changed}
    (narrow_vae / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as caught:
        identify(narrow_vae, settings(narrow_vae))
    assert str(caught.value).startswith("vae.")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "[" * 100_000, "9" * 5000, "version https://git-lfs.github.com/spec/v1\n"]
)
def test_a_configuration_that_is_none_is_one_line(narrow_vae: Path, text: str) -> None:
    (narrow_vae / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"vae\.path: .*config\.json: (no JSON|says not which class)"):
        identify(narrow_vae, settings(narrow_vae))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("decoder.conv_in.bias"), "1 tensors are missing, decoder.conv_in.bias first"),
        (lambda tensors: tensors.pop("quant_conv.weight"), "1 tensors are missing, quant_conv.weight first"),
        (lambda tensors: tensors.update(loss=torch.zeros(1)), "1 tensors are unexpected, loss first"),
        (
            lambda tensors: tensors.update({"quant_conv.bias": torch.zeros(3)}),
            r"not load as an AutoencoderKL; get .*Error: ",
        ),
        (lambda tensors: tensors.clear(), "does not load as an AutoencoderKL: 176 tensors are missing"),
        (lambda tensors: tensors.update({"\x1b[2J": torch.zeros(1)}), r"1 tensors are unexpected, \\x1b\[2J first"),
    ],
)
def test_weights_that_lack_a_tensor_are_refused_not_filled_with_random_numbers(narrow_vae, change, message) -> None:
    tensors = load_file(narrow_vae / WEIGHTS)
    change(tensors)
    save_file(tensors, narrow_vae / WEIGHTS)
    with pytest.raises(UserError, match=message) as caught:
        load_vae(narrow_vae)
    assert "\n" not in str(caught.value)


def shard(folder: Path, variant: str = "") -> None:
    """Replaces the file of weights by two and their list."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    parts = {f"diffusion_pytorch_model{variant}-0000{k}-of-00002.safetensors": names[k - 1 :: 2] for k in (1, 2)}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}
    (folder / f"{WEIGHTS}.index{variant}.json").write_text(json.dumps(index))
    (folder / WEIGHTS).unlink()


def rename_to_variant(folder: Path, variant: str = "fp16") -> None:
    (folder / WEIGHTS).rename(folder / f"diffusion_pytorch_model.{variant}.safetensors")


@pytest.mark.parametrize("layout", [rename_to_variant, shard, lambda folder: shard(folder, ".fp16")])
def test_weights_of_a_variant_or_in_several_files_are_the_same_weights(narrow_vae: Path, layout) -> None:
    expected = load_file(narrow_vae / WEIGHTS)
    before = identify(narrow_vae, settings(narrow_vae))
    layout(narrow_vae)
    found = load_vae(narrow_vae).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert identify(narrow_vae, settings(narrow_vae)).scaling_factor == before.scaling_factor


def test_of_several_files_each_byte_counts_for_the_identity(narrow_vae: Path) -> None:
    shard(narrow_vae)
    before = identify(narrow_vae, settings(narrow_vae))
    part = narrow_vae / "diffusion_pytorch_model-00002-of-00002.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(part).items()}, part)
    assert identify(narrow_vae, settings(narrow_vae)).weights_sha256 != before.weights_sha256


def keep_pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def keep_two_variants(folder: Path) -> None:
    shutil.copy(folder / WEIGHTS, folder / "diffusion_pytorch_model.bf16.safetensors")
    rename_to_variant(folder)


def lose_a_shard(folder: Path) -> None:
    shard(folder)
    (folder / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()


def name_a_file_elsewhere(folder: Path) -> None:
    shutil.move(folder / WEIGHTS, folder.parent / "elsewhere.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))


def make_a_pipeline(folder: Path) -> None:
    shutil.copytree(folder, folder / "vae")
    (folder / "config.json").rename(folder / "model_index.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (keep_pickled, f"has no {WEIGHTS} but diffusion_pytorch_model.bin, which is pickled; get that file"),
        (keep_two_variants, "but several variants of it, bf16, fp16; copy the one you mean"),
        (lose_a_shard, "names 'diffusion_pytorch_model-00002-of-00002.safetensors', which is no file beside it"),
        (name_a_file_elsewhere, r"names '\.\./elsewhere\.safetensors', which is no file beside it"),
        (lambda folder: (folder / WEIGHTS).rename(folder / INDEX), "no list of weight files"),
        (make_a_pipeline, r"is a pipeline; set vae\.subfolder, usually to vae"),
    ],
)
def test_missing_or_unsupported_weights_are_rejected(narrow_vae: Path, change, message: str) -> None:
    change(narrow_vae)
    with pytest.raises(UserError, match=message) as caught:
        find_vae(settings(narrow_vae))
    assert "\n" not in str(caught.value)


class Hub:
    """A repository of the hub, and what of it is in the cache."""

    def __init__(self, repository: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.repository, self.cache = repository, cache
        cache.mkdir()
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.download)

    def download(self, name: str, *, allow_patterns: list[str], local_files_only: bool, **_: object) -> str:
        for path in [] if local_files_only else self.repository.rglob("*"):
            relative = str(path.relative_to(self.repository))
            if path.is_file() and any(fnmatch.fnmatch(relative, pattern) for pattern in allow_patterns):
                (self.cache / relative).parent.mkdir(exist_ok=True)
                shutil.copy(path, self.cache / relative)
        return str(self.cache)


@pytest.mark.parametrize("layout", [lambda folder: None, rename_to_variant, shard])
def test_a_repository_is_fetched_whatever_its_weights_are_called(tmp_path, narrow_vae, monkeypatch, layout) -> None:
    layout(narrow_vae)
    hub = Hub(narrow_vae, tmp_path / "cache", monkeypatch)
    wanted = VAE(path="somebody/some-vae")
    assert find_vae(wanted) is None
    assert load_vae(fetch_vae(wanted)).config.scaling_factor == 0.18215
    assert find_vae(wanted) == hub.cache


def test_of_a_repository_the_usual_file_alone_is_fetched(tmp_path, narrow_vae, monkeypatch) -> None:
    for name in ("diffusion_pytorch_model.fp16.safetensors", "sdxl_vae.safetensors", "diffusion_pytorch_model.bin"):
        (narrow_vae / name).write_bytes(b"large")
    hub = Hub(narrow_vae, tmp_path / "cache", monkeypatch)
    fetch_vae(VAE(path="somebody/some-vae"))
    assert sorted(path.name for path in hub.cache.iterdir()) == ["config.json", WEIGHTS]


def test_of_a_repository_that_is_a_pipeline_the_subfolder_is_asked_for(tmp_path, narrow_vae, monkeypatch) -> None:
    make_a_pipeline(narrow_vae)
    Hub(narrow_vae, tmp_path / "cache", monkeypatch)
    with pytest.raises(UserError, match=r"is a pipeline; set vae\.subfolder"):
        fetch_vae(VAE(path="somebody/some-pipeline"))
    assert fetch_vae(VAE(path="somebody/some-pipeline", subfolder="vae")) == tmp_path / "cache/vae"
