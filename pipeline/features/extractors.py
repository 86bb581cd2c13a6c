"""Images to features: torch-fidelity's Inception; EfficientNet-Lite and DINOv2 are registered beside it.

Importing this module takes seconds (torch): commands do so inside the functions that use it. timm, which takes as many
again, is imported where a network of it is built.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch_fidelity import register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.utils import create_feature_extractor

from common.efficientnet import PUBLISHED, installed_weights
from common.errors import UserError, errors_as
from common.files import sha256_file
from common.ranks import float32_throughout, own_device
from common.recipe import Evaluate
from pipeline.features import dinov2, efficientnet

INCEPTION = "inception-v3-compat"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
EFFICIENTNET = "efficientnet-lite0"
# evaluate.feature_extractor lists the extractors too (common/recipe/sampling.py). What each gives, by torch-fidelity's
# names: the pooled features that a Fréchet distance is taken of, and the logits of an Inception Score.
LAYERS = {
    INCEPTION: {"pooled": "2048", "logits": "logits_unbiased"},
    **{name: {"pooled": efficientnet.POOLED} for name in PUBLISHED},
    **{name: {"pooled": dinov2.POOLED} for name in dinov2.ARCHITECTURES},
}
# Inception's also, for sFID as ADM's evaluator has it: the first channels of `mixed_6/conv:0` of the published
# TensorFlow graph. It counts its blocks from `mixed`, which is torch's Mixed_5b: `mixed_6` is Mixed_6d, `conv` its 1x1
# branch after the ReLU. TensorFlow's channels come last, and so they do in `mu_s` and `sigma_s` of ADM's files.
SPATIAL = "spatial"
SPATIAL_CHANNELS = 7  # 17 x 17 x 7 = 2,023 numbers
WIDTHS = {  # expected feature dimension, for checking third-party statistics files
    (INCEPTION, "pooled"): 2048,
    (INCEPTION, SPATIAL): 17 * 17 * SPATIAL_CHANNELS,
    **{(name, "pooled"): efficientnet.WIDTH for name in PUBLISHED},
    **{(name, "pooled"): width for name, width in dinov2.WIDTHS.items()},
}

METRICS = {  # the layer that each metric is measured on; evaluate.metrics lists them too
    "frechet": "pooled",
    "spatial": SPATIAL,
    "inception_score": "logits",
    "kid": "pooled",
    "precision_recall": "pooled",
    "density_coverage": "pooled",
}

NAMES = {  # of a number with the published Inception weights, and with any others
    "frechet": ("FID", "FD"),
    "spatial": ("sFID", "spatial FD"),
    "inception_score": ("Inception Score", "exp of mean KL"),
    "kid": ("KID", "kernel distance"),
}

Features = dict[str, NDArray[np.float32]]  # by layer: each (B, D)


for _name in PUBLISHED:
    register_feature_extractor(_name, efficientnet.EfficientNetLite)
for _name in dinov2.ARCHITECTURES:
    register_feature_extractor(_name, dinov2.DinoV2)


@dataclass(frozen=True)
class ExtractorWeights:
    """Which extractor, with which weights: what a distance must be printed with."""

    extractor: str
    path: Path
    sha256: str
    compared: bool = False  # whether the file was hashed to get it; others are compared with it when they are loaded

    @property
    def distance_name(self) -> str:
        return self.name_of("frechet")

    def name_of(self, number: str) -> str:
        """How a number is printed; the one home of these names. Only the published Inception weights measure what the
        field calls FID, sFID, KID and Inception Score.
        """
        published, other = NAMES.get(number, (number, number))
        if self.extractor in PUBLISHED:
            return f"{other} ({PUBLISHED[self.extractor].shown})"
        if self.extractor in dinov2.ARCHITECTURES:
            return f"{other} ({self.extractor.removesuffix('-local')} with weights {self.sha256[:8]})"
        return published if self.sha256 == INCEPTION_SHA256 else f"{other} (Inception with weights {self.sha256[:8]})"


def find_extractor_weights(evaluate: Evaluate) -> ExtractorWeights:
    """The weights that the recipe means; nothing is downloaded yet. Raises UserError where a named file is missing."""
    extractor, named = evaluate.feature_extractor, evaluate.feature_extractor_weights
    if named and not Path(named).is_file():
        installed = extractor in PUBLISHED
        advice = "correct the path, or leave it out" if installed else _advice(extractor, Path(named))
        raise UserError(f"evaluate.feature_extractor_weights: no file {named}; {advice}")
    if published := PUBLISHED.get(extractor):
        path = Path(named) if named else installed_weights(extractor, "evaluate.feature_extractor")
        return ExtractorWeights(extractor, path, published.sha256)
    if extractor in dinov2.ARCHITECTURES and not named:
        raise UserError(f"evaluate.feature_extractor_weights: {extractor} needs a file; {_advice(extractor, Path())}")
    if named:  # Inception's may be others than the published ones: `distance_name` says so
        return ExtractorWeights(extractor, Path(named), sha256_file(named), compared=True)
    usual = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]  # as torch-fidelity has it
    return ExtractorWeights(extractor, usual, INCEPTION_SHA256)


def layers_of(extractor: str) -> tuple[str, ...]:
    """The layers that an extractor gives."""
    return (*LAYERS[extractor], *((SPATIAL,) if extractor == INCEPTION else ()))


def wanted_metrics(evaluate: Evaluate) -> tuple[str, ...]:
    """The recipe's metrics, or all that its extractor gives. Raises UserError for one that it does not give."""
    layers = layers_of(evaluate.feature_extractor)
    given = [metric for metric, layer in METRICS.items() if layer in layers]
    for metric in evaluate.metrics or ():
        if metric not in given:
            raise UserError(
                f"evaluate.metrics: {evaluate.feature_extractor} does not give {metric}; it gives {', '.join(given)}"
            )
    return tuple(given) if evaluate.metrics is None else evaluate.metrics


def wanted_layers(evaluate: Evaluate) -> list[str]:
    needed = {"pooled", *(METRICS[metric] for metric in wanted_metrics(evaluate))}
    return [layer for layer in layers_of(evaluate.feature_extractor) if layer in needed]


class Extractor:
    """A network behind torch-fidelity's interface, and which of its layers are wanted."""

    def __init__(self, network: FeatureExtractorBase, layers: Sequence[str]) -> None:
        self.network, self.layers = network, tuple(layers)
        self.device = next(network.parameters()).device
        self._spatial = torch.empty(0)
        if SPATIAL in layers:
            network.get_submodule("Mixed_6d.branch1x1").register_forward_hook(self._keep_spatial)

    def __call__(self, images: NDArray[np.uint8]) -> Features:
        """Features of images (B, H, W, 3)."""
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)  # (B, 3, H, W)
        with torch.inference_mode():
            layers = list(self.network(pixels.to(self.device)))
        if SPATIAL in self.layers:
            layers.append(self._spatial)
        return {name: values.cpu().numpy() for name, values in zip(self.layers, layers, strict=True)}

    def _keep_spatial(self, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # (B, 192, 17, 17) -> (B, 2023)


def load_extractor(
    weights: ExtractorWeights, layers: Sequence[str] = ("pooled",), device: torch.device | None = None
) -> Extractor:
    """Inception's published weights are downloaded if they are not here. `device`: this process's own.

    Raises UserError for a failed download, a file of another sha256, and a file of other tensors.
    """
    if not weights.path.is_file():
        _download_inception(weights.path)
    sha256 = weights.sha256 if weights.compared else sha256_file(weights.path)
    if sha256 != weights.sha256:
        advice = _advice(weights.extractor, weights.path)
        raise UserError(f"{weights.path}: sha256 is {sha256}, should be {weights.sha256}; {advice}")
    wanted = [layer for layer in layers_of(weights.extractor) if layer in layers]
    names = LAYERS[weights.extractor]
    with errors_as(
        UserError, f"{weights.path}: no weights of {weights.extractor}; {_advice(weights.extractor, weights.path)}"
    ):
        # torch-fidelity unpickles Inception's file without limits; a file that passes this load holds tensors only.
        torch.load(weights.path, map_location="cpu", weights_only=True)
        network = create_feature_extractor(
            weights.extractor,
            [names[layer] for layer in wanted if layer in names],
            cuda=False,
            feature_extractor_weights_path=str(weights.path),
            verbose=False,
        )
    float32_throughout()
    network.to(device or own_device(), memory_format=torch.channels_last)  # half the time on CPUs
    return Extractor(network, wanted)


class NamedExtractor:
    """The extractor that a recipe names: its weights are found at once, and loaded for the first features."""

    def __init__(self, evaluate: Evaluate) -> None:
        self.weights, self.layers = find_extractor_weights(evaluate), wanted_layers(evaluate)
        self.metrics = wanted_metrics(evaluate)
        self._batch_size = evaluate.batch_size

    @cached_property
    def network(self) -> Extractor:
        """Errors as `load_extractor`."""
        return load_extractor(self.weights, self.layers)

    def features(self, images: Iterable[NDArray[np.uint8]]) -> Iterator[Features]:
        """As `extract`."""
        return extract(self.network, images, self._batch_size)


def extract(extractor: Extractor, images: Iterable[NDArray[np.uint8]], batch_size: int) -> Iterator[Features]:
    """Features of images `(H, W, 3)` uint8, in order, a batch at a time; an array `(N, H, W, 3)` will do."""
    rest = iter(images)
    while batch := list(islice(rest, batch_size)):
        yield extractor(np.stack(batch))


def fetch_extractor_weights(evaluate: Evaluate) -> None:
    """Downloads weights that are missing. Raises UserError where that fails."""
    weights = find_extractor_weights(evaluate)
    if not weights.path.is_file():
        _download_inception(weights.path)


def _download_inception(path: Path) -> None:
    """Fetches the published weights under a temporary name; their sha256 is checked before they get this one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=INCEPTION_SHA256)
    except (OSError, RuntimeError) as error:  # no network, or another sha256
        raise UserError(f"evaluate.feature_extractor: {error}; {_advice(INCEPTION, path)}") from None


def _advice(extractor: str, path: Path) -> str:
    if extractor == INCEPTION:
        return f"fetch {URL_INCEPTION_V3} and put it at {path}"
    if extractor in dinov2.ARCHITECTURES:
        return "fetch the backbone of that size without registers that github.com/facebookresearch/dinov2 links to"
    return PUBLISHED[extractor].advice
