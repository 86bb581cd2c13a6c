"""The images, their latents, and the autoencoder between the two."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import StrictBool
from pydantic.dataclasses import dataclass

from common.recipe.fields import STRICT, AtLeastZero, Count, CountOrZero, Fraction, Place, Positive

WITH_FIELDS = ("webdataset", "parquet", "imagenet")  # sources that accept image_field and label_field


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DemoImages:
    """The portraits that `preprocess/demo_images.py` composes. Only the demo has this section."""

    per_class: Count = 1024
    """Training images of each class."""
    held_out_per_class: Count = 128
    """Images of each class that training never sees."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Data:
    """Where the images come from and where their latents go."""

    images: Place = "data/images"
    """Folder, archive or table of the training images, in the form that `source` says."""
    held_out: Place | None = None
    """Images that training never sees: the distance to them is reported beside the distance to the training images."""
    source: Literal["folder", "imagenet", "ffhq", "celebahq", "lsun", "webdataset", "parquet", "idx"] = "folder"
    """`folder`: one sub-folder a class. `webdataset`: tars of key.jpg and key.cls. `parquet`: as Hugging Face writes
    it. `idx`: MNIST's and Fashion-MNIST's files. The others are data sets, in every form in which they are distributed
    (docs/data.md)."""
    image_field: str | None = None
    """For `webdataset` and `parquet`: what holds the image, an extension such as `jpg` or a column. null: found in the
    data."""
    label_field: str | None = None
    """For `webdataset` and `parquet`: what holds the label, such as `cls`, `json:label` or a column. null: found in the
    data. `none`: one class, whatever labels there are."""
    follow_links: StrictBool = False
    """Read what symbolic links below `images` lead to, wherever it is. Not in archives."""
    crop: Literal["center", "short_side", "resize", "fit"] = "center"
    """`center`: ADM's center crop, for ImageNet. `short_side`: LSUN's. `resize`: Lanczos without a crop, for aligned
    images. `fit`: the whole image, and white beside it, for images on white."""
    resolution: Count = 256
    """Side of the images that are encoded, in pixels."""
    shards: Place = "data/shards"
    """Folder of the latents. Training also reads any fsspec address, such as s3://bucket/folder, through `cache`."""
    shard_samples: Count = 8192
    """Samples in one shard."""
    format: Literal["tar", "ffcv"] = "tar"
    """`ffcv`: training reads the one file that preprocess/beton.py makes of the shards; the samples are the same."""
    cache: str | None = None
    """Folder on a local disk for copies of shards, each checked before it is used. `~` and `$SCRATCH` are those of the
    machine that trains; in other fields they are expanded at once."""
    cache_gb: Positive | None = None
    """Size of the cache in GB: the shards used longest ago are deleted. Several times `mixed_blocks` shards is best.
    null: no limit."""
    stage_in: StrictBool = False
    """Copy all shards into `cache` before the first step, once a node."""
    order: Literal["random", "block"] = "random"
    """`random`: every sample at random. `block`: shards nearly in sequence, for slow or remote storage."""
    mixed_blocks: Count = 16
    """In block order: shards whose samples are shuffled together."""
    lanes: Count = 1
    """In block order: parts of a step that read shards of their own, best one a node. Divides train.batch_size."""
    flips: StrictBool = True
    """Also store the latents of the mirrored images; training draws one of the two."""
    max_rejected: Fraction = 0.001
    """Share of unreadable images above which encoding stops."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class VAETraining:
    """An autoencoder is trained on the images, before they are encoded, and written to `vae.path`. Only recipes that
    want one have this section."""

    images: CountOrZero = 16_000
    """Images that it sees, each counted every time. 0: the weights in `start` stay, but for the decoder's."""
    start: Place | None = None
    """Folder of an autoencoder of the same network, whose weights it starts from, such as ./assets/vae-demo. null: from
    nothing, which takes several times as many images."""
    kl_weight: AtLeastZero = 5e-3
    """Weight of the posterior's divergence from noise, which is reached at the end. More: latents that are easier to
    learn, and a lower PSNR; the demo's autoencoder had 0.06 at last."""
    decoder_images: CountOrZero = 0
    """Images on which the decoder alone is trained after that, from latents with noise, by what an EfficientNet sees in
    its images: sharp details, and a lower PSNR. The latents stay as they are."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class VAE:
    """The autoencoder. Channels and downsampling are compared with its configuration; a dry run needs no weights."""

    path: Place | None = "stabilityai/sd-vae-ft-ema"
    """A folder that `save_pretrained` wrote, or a Hugging Face id. ./folder is never taken for an id. null: no
    autoencoder, for images of 32 to 64 px: a latent is the image itself, in [-1, 1], with latent_channels=3 and
    downsampling=1. It takes 12 bytes a pixel on disk."""
    subfolder: str | None = None
    """The folder below `path` that holds the VAE: `vae` in the repositories of SD3 and FLUX."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id. null: its main branch."""
    latent_channels: Count = 4
    """Channels of a latent."""
    downsampling: Count = 8
    """Pixels of an image on the side of one element of its latent."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of encoding and decoding."""
    batch_size: Count = 32
    """Images that one process encodes or decodes at once."""
    training: VAETraining | None = None

    @property
    def folder(self) -> Path:
        """Where `training` writes it."""
        assert self.path is not None
        return Path(self.path)


def check_vae(vae: VAE) -> None:
    """Raises ValueError for a field that means an autoencoder where there is none."""
    images = {"latent_channels": 3, "downsampling": 1, "precision": "fp32", "training": None, "subfolder": None}
    for name, wanted in images.items() if vae.path is None else ():
        if getattr(vae, name) != wanted:
            found = getattr(vae, name) if name != "training" else "set"
            raise ValueError(
                f"vae.{name}: {found}, but vae.path is null: latents are the images; set it to "
                f"{'null' if wanted is None else wanted}"
            )
    if vae.training is not None and not vae.training.images:
        for name in ("start", "decoder_images"):
            if not (found := getattr(vae.training, name)):
                shown = "null" if found is None else found
                raise ValueError(
                    f"vae.training.{name}: {shown}, but vae.training.images is 0, so that the decoder of given "
                    "weights is trained alone; set it, or more images"
                )


def check_data(data: Data) -> None:
    """Raises ValueError for fields of the section that do not go together."""
    if data.cache is None and (data.stage_in or "://" in data.shards):
        needs = "stage_in" if data.stage_in else f"shards: {data.shards}"
        raise ValueError(f"data.{needs} needs data.cache, a folder on a local disk")
    shards = Path(data.shards)
    places = [shards, *(shards.parents if data.source == "folder" else ())]
    for name in ("images", "held_out"):
        if (found := getattr(data, name)) and Path(found) in places:
            raise ValueError(
                f"data.shards: {data.shards} is data.{name}, or in it, and would be read as images; name another"
            )
    # A folder has no fields either, but its images can be said to have no labels.
    for field, value in (("image_field", data.image_field), ("label_field", data.label_field)):
        alone = data.source == "folder" and field == "label_field"
        if value is not None and data.source not in WITH_FIELDS and not (alone and value == "none"):
            more = ", which has `none` only: all images are one class" if alone else ""
            raise ValueError(f"data.{field}: is for {', '.join(WITH_FIELDS)}, and data.source is {data.source}{more}")
    if data.follow_links and data.source in ("webdataset", "parquet", "idx"):
        raise ValueError(f"data.follow_links: is for images in folders, and data.source is {data.source}")
