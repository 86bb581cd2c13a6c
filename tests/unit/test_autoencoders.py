"""Autoencoders as they are published: read through diffusers, checked against the recipe, refused by name."""

import hashlib
from pathlib import Path

from common.recipe import VAE
from preprocess.encoder import identify

PUBLISHED = Path(__file__).parents[1] / "published"


def published(name: str, folder: Path) -> Path:
    """A folder with a published configuration, byte for byte, and a file in the place of its weights."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes((PUBLISHED / name / "config.json").read_bytes())
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    return folder


def test_what_a_published_configuration_leaves_out_is_what_diffusers_fills_in(tmp_path: Path) -> None:
    folder = published("sd-vae-ft-ema", tmp_path)
    assert hashlib.sha256((folder / "config.json").read_bytes()).hexdigest().startswith("92d3dfb7")
    identity = identify(folder, VAE())
    assert (identity.scaling_factor, identity.shift_factor) == (0.18215, 0.0)
