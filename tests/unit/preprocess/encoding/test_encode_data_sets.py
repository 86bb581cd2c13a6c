"""The four data sets, each in a form in which it is passed on, become latents of the right images and labels."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from common.recipe import VAE, Data, Model, Recipe
from preprocess.encoding.encoder import Encoder
from preprocess.images.images import CROPS, decode, to_tensor
from preprocess.shards import LatentShards, verify
from tests.encoding_stage import encode, plan
from tests.photographs import photographs, tar_bytes, write_folder, write_lmdb, write_parquet, write_zip

COUNT, SIDE = 9, 16
WNIDS = ("n01440764", "n02123045", "n15075141")
Images = list[bytes]


def imagenet(folder: Path, images: Images) -> tuple[Path, list[int]]:
    classes = [
        {f"{wnid}_{number}.JPEG": images[3 * label + number] for number in range(3)} for label, wnid in enumerate(WNIDS)
    ]
    tars = {f"{wnid}.tar": tar_bytes(files) for wnid, files in zip(WNIDS, classes, strict=True)}
    (folder / "train.tar").write_bytes(tar_bytes(tars))
    return folder / "train.tar", [0, 0, 0, 1, 1, 1, 2, 2, 2]


def imagenet_parquet(folder: Path, images: Images) -> tuple[Path, list[int]]:
    labels = [7, 999, 0, 7, 388, 0, 1, 2, 999]
    names = [f"name {label}" for label in range(1000)]
    write_parquet(folder / "data/train-00000-of-00001.parquet", list(images), labels, names)
    return folder / "data", labels


def ffhq(folder: Path, images: Images) -> tuple[Path, list[int]]:
    files = {f"{number // 3 * 1000:05d}/{number:05d}.png": data for number, data in enumerate(images)}
    return write_folder(folder / "images1024x1024", files), [0] * COUNT


def celebahq(folder: Path, images: Images) -> tuple[Path, list[int]]:
    return write_zip(folder / "celeba_hq.zip", {f"{n:05d}.jpg": data for n, data in enumerate(images)}), [0] * COUNT


def celebahq_npy(folder: Path, images: Images) -> tuple[Path, list[int]]:
    """As its authors' script writes them: (1, 3, H, W)."""
    arrays = [np.asarray(decode(data)).transpose(2, 0, 1)[None] for data in images]
    (folder / "npy").mkdir()
    for number, array in enumerate(arrays):
        np.save(folder / f"npy/imgHQ{number:05d}.npy", array)
    return folder / "npy", [0] * COUNT


def webdataset(folder: Path, images: Images) -> tuple[Path, list[int]]:
    labels = [number % 3 for number in range(COUNT)]
    files: dict[str, bytes] = {}
    for number, data in enumerate(images):
        files |= {f"{number:03d}.jpg": data, f"{number:03d}.cls": str(labels[number]).encode()}
    (folder / "train-000000.tar").write_bytes(tar_bytes(files))
    return folder / "train-000000.tar", labels


def lsun(folder: Path, images: Images) -> tuple[Path, list[int]]:
    files = {f"{number}a9f": data for number, data in enumerate(images)}
    return write_lmdb(folder / "church_outdoor_train_lmdb", files), [0] * COUNT


LAYOUTS: dict[str, tuple[Callable[[Path, Images], tuple[Path, list[int]]], str, str, str]] = {
    "imagenet's tar of tars": (imagenet, "imagenet", "jpeg", "center"),
    "imagenet's parquet": (imagenet_parquet, "imagenet", "jpeg", "center"),
    "ffhq's tree": (ffhq, "ffhq", "png", "resize"),
    "celebahq's zip": (celebahq, "celebahq", "jpeg", "resize"),
    "celebahq's arrays": (celebahq_npy, "celebahq", "png", "resize"),
    "lsun's lmdb": (lsun, "lsun", "webp", "short_side"),
    "a webdataset": (webdataset, "webdataset", "jpeg", "center"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_latent_is_of_its_image_and_has_its_label(layout: str, tmp_path: Path, tiny_vae: Path) -> None:
    make, data_set, suffix, crop = LAYOUTS[layout]
    originals = photographs(COUNT, suffix, (40, 32))
    path, labels = make(tmp_path, originals)
    data = Data(
        images=str(path), source=data_set, crop=crop, resolution=SIDE, shards=str(tmp_path / "shards"), shard_samples=4
    )
    recipe = Recipe(
        name="test", data=data, vae=VAE(path=str(tiny_vae), downsampling=4), model=Model(num_classes=max(labels) + 1)
    )
    encode(recipe)
    shards = LatentShards(data.shards)
    assert shards.labels.tolist() == labels
    images = torch.stack([to_tensor(CROPS[crop](decode(data), SIDE)) for data in originals])
    expected = Encoder(recipe.vae).encode(images).numpy()
    found = shards.gather(np.arange(COUNT)).astype(np.float32)
    distances = np.abs(found[:, None] - expected[None]).max(axis=(2, 3, 4))  # (of a latent, to an image)
    assert (distances.argmin(axis=1) == np.arange(COUNT)).all()
    assert distances.diagonal().max() < 5e-3 < np.sort(distances, axis=1)[:, 1].min()
    assert not list(verify(data.shards))


def tiny_autoencoder(folder: Path) -> Path:
    from diffusers import AutoencoderTiny

    channels = (8, 8, 8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderTiny(
            encoder_block_out_channels=channels,
            decoder_block_out_channels=channels,
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
        )
    vae.save_pretrained(folder)
    return folder


def test_a_tiny_autoencoder_has_latents_without_deviation(tmp_path: Path) -> None:
    encoder = Encoder(VAE(path=str(tiny_autoencoder(tmp_path / "taesd")), downsampling=4))
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moments = encoder.encode(images)
    assert moments.shape == (2, 8, 4, 4)
    mean, std = moments.chunk(2, dim=1)
    assert torch.equal(mean, encoder.network.encode(images).latents)
    assert (std == 0).all()
    assert encoder.decode(mean).shape == images.shape


@pytest.mark.parametrize(
    ("channels", "shift", "scaling"), [(4, None, 0.13025), (16, 0.0609, 1.5305), (16, 0.1159, 0.3611)]
)
def test_the_vaes_of_sdxl_sd3_and_flux_are_known_by_their_configuration(
    tmp_path: Path, channels: int, shift: float | None, scaling: float
) -> None:
    """In a subfolder, as SD3 and FLUX have it; of their shape, and untrained."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=4,
        latent_channels=channels,
        layers_per_block=1,
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
        force_upcast=True,
    )
    vae.save_pretrained(tmp_path / "vae")
    encoder = Encoder(VAE(path=str(tmp_path), subfolder="vae", latent_channels=channels))
    assert (encoder.identity.scaling_factor, encoder.identity.shift_factor) == (scaling, shift or 0.0)
    assert encoder.encode(torch.zeros(1, 3, 16, 16)).shape == (1, 2 * channels, 2, 2)


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.05), ("fp16", 0.01)])
def test_other_precisions_are_near_to_fp32(tiny_vae: Path, precision: str, tolerance: float) -> None:
    images = torch.stack([to_tensor(decode(data)) for data in photographs(2, "png", (16, 16))])
    exact = Encoder(VAE(path=str(tiny_vae), downsampling=4)).encode(images)
    found = Encoder(VAE(path=str(tiny_vae), downsampling=4, precision=precision)).encode(images)
    assert 0 < (found - exact).norm() / exact.norm() < tolerance


def test_a_kind_of_autoencoder_that_is_not_read_is_named(tmp_path: Path, tiny_vae: Path) -> None:
    folder = write_folder(tmp_path / "vae", {path.name: path.read_bytes() for path in tiny_vae.iterdir()})
    config = (folder / "config.json").read_text().replace("AutoencoderKL", "AutoencoderOobleck")
    (folder / "config.json").write_text(config)
    Image.new("RGB", (16, 16)).save(tmp_path / "0.png")
    recipe = Recipe(
        name="test",
        data=Data(images=str(write_folder(tmp_path / "images", {"0.png": photographs(1)[0]})), resolution=16),
        vae=VAE(path=str(folder), downsampling=4),
        model=Model(num_classes=1),
    )
    told = r"vae\.path: .* is an AutoencoderOobleck; .*KL, .*Tiny, .*DC and .*RAE can be read"
    with pytest.raises(UserError, match=told):
        plan(recipe)
