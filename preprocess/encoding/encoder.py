"""The autoencoder: images to posterior moments, latents back to images."""

import hashlib
import importlib.util
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError, errors_as
from common.files import sha256_file
from common.recipe import VAE
from fpdm import autoencoders
from fpdm.diffusers_folders import CONFIG_NAME, PIPELINE_NAME, STEM, WEIGHTS_NAME, read_configuration, weight_files
from fpdm.latents import unscale_latents

REPRESENTATION = "AutoencoderRAE"
# Supported classes, and their config's list of encoder stages, each but the first of which halves the side; or none.
KINDS = {
    "AutoencoderKL": "block_out_channels",
    "AutoencoderTiny": "encoder_block_out_channels",
    "AutoencoderDC": "encoder_block_out_channels",
    REPRESENTATION: "",  # one size for all images
}
# Pixels per forward pass on a CPU: beyond them the activations leave its caches and take up to 1.6 times as long.
CPU_PIXELS = 2**16
LARGEST = 1e30  # limit of scaling and shift factors
MAX_STAGES = 16  # of an encoder
LARGEST_SIDE = 2**16
NO_FILE = hashlib.sha256().hexdigest()
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Identity:
    """An autoencoder's files and scaling. Autoencoders with equal identities encode alike."""

    config_sha256: str
    weights_sha256: str
    scaling_factor: float
    shift_factor: float


def find_vae(settings: VAE) -> Path | None:
    """The local folder of a VAE: `vae.path`, or its copy in the hub's cache; None if it is in neither, or null.

    A path that begins with a dot or a slash is never looked up on the hub, where anybody could own its name. Raises
    UserError if such a folder is missing, or if a folder has no config.json or no safetensors.
    """
    if settings.path is None:
        return None
    folder = Path(settings.path)
    if not folder.is_dir() and settings.training is None and settings.path.startswith((".", "/")):
        raise UserError(
            f"vae.path: no folder {settings.path} in {Path.cwd()}; run this in the clone, or correct the path"
        )
    if folder.is_dir():
        return _checked(folder, settings)
    if settings.training is not None:  # it will be a folder, and is never looked up on the hub
        return None
    try:
        return _checked(_from_hub(settings, local_files_only=True), settings)
    except (OSError, UserError):  # missing or incomplete in the cache, or no name of a hub repository
        return None


def fetch_vae(settings: VAE) -> Path | None:
    """As `find_vae`, but downloads a missing VAE. Raises UserError if the download fails."""
    folder = find_vae(settings)
    if folder is not None or settings.path is None:
        return folder
    if settings.training is not None:
        raise UserError(f"vae.path: {settings.path} is not trained yet; run python preprocess/train_vae.py first")
    try:
        return _checked(_from_hub(settings, local_files_only=False), settings)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"vae.path: {settings.path} is no folder, and its download from the hub failed; download "
            f"{settings.subfolder + '/' if settings.subfolder else ''}{CONFIG_NAME} and {WEIGHTS_NAME} from "
            f"https://huggingface.co/{settings.path} into a folder and set vae.path to it. The hub's error: {reason}"
        ) from None


def _checked(parent: Path, settings: VAE) -> Path:
    folder = parent / (settings.subfolder or "")
    if not (folder / CONFIG_NAME).is_file():
        if (folder / PIPELINE_NAME).is_file():
            raise UserError(f"vae.path: {folder} is a pipeline; set vae.subfolder, usually to vae")
        raise UserError(f"vae.path: {folder} has no {CONFIG_NAME}; name a folder written by a VAE's save_pretrained")
    _weights(folder)
    return folder


def _weights(folder: Path) -> tuple[list[Path], str | None]:
    try:
        return weight_files(folder)
    except ValueError as error:
        raise UserError(f"vae.path: {error}") from None


def _from_hub(settings: VAE, *, local_files_only: bool) -> Path:
    """The repository's folder in the hub's cache; it may be incomplete with `local_files_only`.

    Without the usual file of weights, asks for sharded ones or a variant. Raises OSError with the hub's own words.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    prefix = f"{settings.subfolder}/" if settings.subfolder else ""
    for weights in (WEIGHTS_NAME, f"{STEM}*.safetensors*"):
        try:
            folder = snapshot_download(
                str(settings.path),
                revision=settings.revision,
                allow_patterns=[prefix + CONFIG_NAME, prefix + PIPELINE_NAME, prefix + weights],
                local_files_only=local_files_only,
            )
        except (ValueError, HTTPError) as error:  # an impossible name; a broken connection
            raise OSError(str(error)) from None
        if not (Path(folder) / prefix / CONFIG_NAME).is_file() or (Path(folder) / prefix / WEIGHTS_NAME).is_file():
            break
    return Path(folder)


def find_identity(settings: VAE, *, download: bool = False) -> Identity | None:
    """`identify` of `find_vae`, or of `fetch_vae`; None where the VAE is not here."""
    folder = fetch_vae(settings) if download else find_vae(settings)
    return identify(folder, settings) if folder or settings.path is None else None


def identify(folder: Path | None, settings: VAE) -> Identity:
    """Checks a VAE's config.json against the recipe, without loading the network. None: that of `Pixels`.

    Raises UserError for an unsupported class, for other latent channels or downsampling than in the recipe, and for
    scaling that is missing, invalid or by channel; an AutoencoderRAE scales by channel inside of the class.
    """
    if folder is None:
        return Identity(config_sha256=NO_FILE, weights_sha256=NO_FILE, scaling_factor=1.0, shift_factor=0.0)
    config = _configuration(folder)[1]
    for name, value in _sizes(folder, config).items():
        if value != getattr(settings, name):
            raise UserError(
                f"vae.{name}: {getattr(settings, name)} in the recipe, but {short(value)} in {folder}; set it to that"
            )
    _number(folder, "scaling_factor", config["scaling_factor"])
    with errors_as(UserError, f"vae.path: {folder / CONFIG_NAME} is of no use here"):
        scaling_factor, shift_factor = autoencoders.scaling(config)
    return Identity(
        config_sha256=sha256_file(folder / CONFIG_NAME),
        weights_sha256=_sha256(_weights(folder)[0]),
        scaling_factor=float(scaling_factor),
        shift_factor=_number(folder, "shift_factor", shift_factor),
    )


def check_side(settings: VAE, resolution: int) -> None:
    """Raises UserError where the autoencoder takes images of another size alone. It must be there (`find_vae`)."""
    folder = find_vae(settings)
    config = _configuration(folder)[1] if folder else {}
    if not autoencoders.scales_itself(config):
        return
    side = config["patch_size"] * (config["encoder_input_size"] // config["encoder_patch_size"])
    if side != resolution:
        raise UserError(
            f"data.resolution: {resolution}, but the autoencoder in {folder} takes images of {side} pixels alone; set "
            "it to that, or choose another autoencoder"
        )


def _configuration(folder: Path) -> tuple[Any, dict[str, Any]]:
    """A VAE's class in diffusers and its constructor arguments, defaults included."""
    try:
        kind, config = read_configuration(folder, tuple(KINDS))
    except ValueError as error:
        raise UserError(f"vae.path: {error}") from None
    if autoencoders.scales_itself(config) and not importlib.util.find_spec("transformers"):
        raise UserError(
            f"vae.path: {folder} is an {REPRESENTATION}, whose encoder is of the package transformers, which is not "
            "installed; pip install -e '.[rae]'"
        )
    return kind, config


def _sizes(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    if autoencoders.scales_itself(config):
        names = ("encoder_hidden_size", "patch_size", "encoder_patch_size", "encoder_input_size")
        sizes = [config[name] for name in names]
        sound = all(type(size) is int and 0 < size < LARGEST_SIDE for size in sizes)
        if config["num_channels"] != 3 or config["reshape_to_2d"] is not True or not sound:
            raise UserError(
                f"vae.path: {folder} is no {REPRESENTATION} of RGB images: see num_channels, reshape_to_2d and "
                f"{', '.join(names)} in {CONFIG_NAME}; choose another"
            )
        return {"latent_channels": sizes[0], "downsampling": sizes[1]}
    stages = next(config[name] for name in KINDS.values() if name in config)
    listed = isinstance(stages, list | tuple) and 0 < len(stages) <= MAX_STAGES
    if config["in_channels"] != 3 or config.get("out_channels", 3) != 3 or not listed:
        raise UserError(
            f"vae.path: {folder} is no VAE of RGB images: see in_channels and stages in {CONFIG_NAME}; choose another"
        )
    return {"latent_channels": config["latent_channels"], "downsampling": 2 ** (len(stages) - 1)}


def _number(folder: Path, name: str, value: Any) -> float:
    where = f"in its {CONFIG_NAME}"
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:
        raise UserError(
            f"vae.path: {folder} has {name} {short(value)} {where}, which is not a finite number; correct it"
        )
    if name == "scaling_factor" and not float(value) > 0:
        raise UserError(f"vae.path: {folder} has {name} {short(value)} {where}; it must be above 0: correct it")
    return float(value)


def _sha256(files: list[Path]) -> str:
    """sha256 of one file, or of the hashes of several files."""
    hashes = [sha256_file(file) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


class Pixels(torch.nn.Module):
    """In an autoencoder's place where `vae.path` is null: a latent is the image itself."""

    def encode(self, images: Tensor) -> tuple[Tensor]:
        """(B, 3, H, W) as they are."""
        return (images,)

    def decode(self, latents: Tensor) -> SimpleNamespace:
        """(B, 3, H, W) as they are."""
        return SimpleNamespace(sample=latents)


class Encoder:
    """A frozen VAE in `vae.precision`, by default on a GPU if there is one. Moments and images are float32.

    All but AutoencoderKL, and pixels, are deterministic: the standard deviation of their moments is 0.
    """

    def __init__(
        self, settings: VAE, device: str | torch.device | None = None, identity: Identity | None = None
    ) -> None:
        """`identity`: as `identify` gave it before; its files are not hashed again."""
        folder = fetch_vae(settings)
        self.identity = identity or identify(folder, settings)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype, self._settings = PRECISIONS[settings.precision], settings
        network: Any = load_vae(folder, self.dtype) if folder else Pixels()
        self.network = network.to(self.device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self._spans: list[tuple[Any, Any]] = []
        self._busy = 0.0

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> moments (B, 2C, h, w): mean and standard deviation, unscaled."""
        return self.moments(images).cpu().contiguous()

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """As `encode`, but asynchronous: the result stays on the device."""
        start = self._mark()
        moments = torch.cat([self._moments(part) for part in self._parts(images, 1)])
        self._spans.append((start, self._mark()))
        return moments

    def _moments(self, images: Tensor) -> Tensor:
        return torch.cat(autoencoders.encode(self.network, self._prepare(images)), dim=1).float()  # (B, 2C, h, w)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> images (B, 3, H, W) float32, clamped to [-1, 1]; they stay on the device."""
        latents = unscale_latents(latents, self.identity.scaling_factor, self.identity.shift_factor)
        parts = self._parts(latents, self._settings.downsampling)
        images = torch.cat([autoencoders.decode(self.network, self._prepare(part)) for part in parts])
        return images.float().clamp(-1, 1).contiguous()

    def _parts(self, values: Tensor, pixels_a_side: int) -> tuple[Tensor, ...]:
        """Splits a batch for the network: `vae.batch_size`, since decoding takes far more memory than a denoising step,
        or fewer on a CPU. `pixels_a_side`: image pixels for each element along a side.
        """
        size = self._settings.batch_size
        if self.device.type == "cpu":
            size = min(size, max(1, CPU_PIXELS // (math.prod(values.shape[2:]) * pixels_a_side**2)))
        return values.split(size)

    @property
    def busy_seconds(self) -> float:
        """Seconds for which the device has computed moments."""
        while self._spans and (self.device.type != "cuda" or self._spans[0][1].query()):
            start, end = self._spans.pop(0)
            self._busy += start.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - start
        return self._busy

    def _mark(self) -> Any:
        """The time on the device: on a GPU, an event after the work queued so far."""
        if self.device.type != "cuda":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _prepare(self, values: Tensor) -> Tensor:
        return values.to(self.device, self.dtype).contiguous(memory_format=torch.channels_last)


def load_vae(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The VAE in the folder from `fetch_vae`. Raises UserError if it does not load, or if a tensor is missing, which
    diffusers would fill with random numbers.
    """
    kind, _ = _configuration(folder)
    variant = _weights(folder)[1]
    logging.getLogger("diffusers.models.modeling_utils").setLevel(logging.ERROR)  # it logs what the error below says
    remedy = f"get {CONFIG_NAME} and the weights of one VAE"
    with errors_as(UserError, f"vae.path: {folder} does not load as an {kind.__name__}; {remedy}"):
        network, loading = kind.from_pretrained(
            folder,
            torch_dtype=dtype,
            variant=variant,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    for fault in ("missing_keys", "unexpected_keys"):
        if names := sorted(loading[fault]):
            raise UserError(
                f"vae.path: {folder} does not load as an {kind.__name__}: {len(names)} tensors are "
                f"{fault.removesuffix('_keys')}, {names[0]} first; {remedy}"
            )
    return network
