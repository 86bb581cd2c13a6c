"""EfficientNet-Lite behind torch-fidelity's interface."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from common.efficientnet import PUBLISHED, load_efficientnet, normalised

POOLED, WIDTH = "1280", 1280
AT_ONCE = 8  # images on a CPU: the maps of more leave its cache (16 took up to a third more time an image on an EPYC)


class EfficientNetLite(FeatureExtractorBase):
    """`(B, 3, H, W)` uint8 RGB of any size to one `(B, 1280)` float32 tensor: the features before the classifier."""

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(name, features_list)
        path = feature_extractor_weights_path or PUBLISHED[name].path
        assert path is not None
        self.side = PUBLISHED[name].side
        self.network: Any = load_efficientnet(name, path)

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
        parts = images.split(AT_ONCE) if images.device.type == "cpu" else [images]
        return (torch.cat([self._pooled(part) for part in parts]),)

    def _pooled(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1280)."""
        resized = functional.interpolate(images.float(), size=(self.side, self.side), mode="bicubic", antialias=True)
        maps = self.network.forward_features(normalised(resized))  # (B, 1280, h, w)
        pooled: Tensor = self.network.forward_head(maps, pre_logits=True)
        return pooled
