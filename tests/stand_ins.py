"""Stand-ins for what the recipes name and nobody ships with a project: the data sets, the autoencoder, Inception.

Each has the form in which it is published; pixels are those of photographs, weights are seeded and random.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.photographs import encoded, photograph, write_folder, write_lmdb

PUBLISHED = Path(__file__).parent / "published"  # configurations as the hub has them
WNIDS = ("n01440764", "n02123045", "n02504458", "n04347754", "n15075141")
# What diffusers called the parts of an attention when these weights were published; their files keep the old names.
OLD_NAMES = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}


def autoencoder(folder: Path, **changes: Any) -> Path:
    """stabilityai/sd-vae-ft-ema: its configuration byte for byte, its tensors' names and shapes (83.65 M parameters).

    `changes` to the configuration make another of it, such as narrower blocks.
    """
    from diffusers import AutoencoderKL

    folder.mkdir(parents=True)
    published = PUBLISHED / "sd-vae-ft-ema" / "config.json"
    config = json.loads(published.read_text()) | changes
    if changes:
        (folder / "config.json").write_text(json.dumps(config))
    else:
        shutil.copy(published, folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = AutoencoderKL.from_config(config).state_dict()
    save_file(
        {_old_name(name): tensor for name, tensor in state.items()}, folder / "diffusion_pytorch_model.safetensors"
    )
    return folder


def _old_name(name: str) -> str:
    for new, old in OLD_NAMES.items():
        name = name.replace(new, old) if ".attentions." in name else name
    return name


def inception_tensors() -> dict[str, torch.Tensor]:
    """Of the names and shapes of torch-fidelity's Inception weights."""
    from torch_fidelity import feature_extractor_inceptionv3 as published

    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(published.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr(published, "load_state_dict_from_url", lambda *_, **__: None)
        network = published.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.ones(tensor.shape, dtype=tensor.dtype)
        if "running_var" in name or tensor.ndim < 2
        else (2.4 / tensor[0].numel()) ** 0.5 * torch.randn(tensor.shape, generator=generator)  # features of about 1
        for name, tensor in network.state_dict().items()
    }


def imagenet(folder: Path, count: int) -> Path:
    """Folders of wnids with JPEGs of many shapes."""
    files = {}
    for number in range(count):
        wnid = WNIDS[number % len(WNIDS)]
        sides = 300 + 31 * number % 200, 300 + 17 * number % 100
        files[f"{wnid}/{wnid}_{number}.JPEG"] = encoded(_larger(number, *sides), "jpeg")
    return write_folder(folder / "train", files)


def ffhq(folder: Path, count: int, side: int) -> Path:
    """The tree of thousands, PNG."""
    numbers = (337 * number for number in range(count))
    files = {f"{n // 1000 * 1000:05d}/{n:05d}.png": encoded(_larger(n, side, side)) for n in numbers}
    return write_folder(folder / "images1024x1024", files)


def celebahq(folder: Path, count: int, side: int) -> Path:
    """One folder of numbered JPEGs."""
    files = {f"{number:05d}.jpg": encoded(_larger(number, side, side), "jpeg") for number in range(count)}
    return write_folder(folder / "celebahq", files)


def lsun(folder: Path, count: int) -> Path:
    """An LMDB of WebPs with keys of 40 hexadecimal digits, the shorter side 256."""
    files = {
        f"{number * 0x9E3779B97F4A7C15:040x}": encoded(_larger(number, 256 + 29 * number % 150, 256), "webp")
        for number in range(count)
    }
    return write_lmdb(folder / "church_outdoor_train_lmdb", files)


def _larger(number: int, width: int, height: int) -> Image.Image:
    return photograph(number).resize((width, height), Image.Resampling.BICUBIC)
