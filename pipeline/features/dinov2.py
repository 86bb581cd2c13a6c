"""DINOv2 (Oquab et al. 2023) behind torch-fidelity's interface, from a local file of the published structure.

torch-fidelity's own loads code and weights from the internet at run time; this one is timm's network with the published
interpolation of position embeddings. It has not been compared with the features of the published weights; distances
carry the sha256 of the weights in their name.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

ARCHITECTURES = {  # by our name: timm's
    "dinov2-vit-s-14-local": "vit_small_patch14_dinov2",
    "dinov2-vit-l-14-local": "vit_large_patch14_dinov2",  # the one of FD-DINOv2 (Stein et al. 2023)
}
WIDTHS = {"dinov2-vit-s-14-local": 384, "dinov2-vit-l-14-local": 1024}
POOLED = "cls"
SIDE, PATCH = 224, 14  # of the images that the network sees, and of its patches
OFFSET = 0.1  # added to the patch count before interpolating, as in the DINOv2 code
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DinoV2(FeatureExtractorBase):
    """`(B, 3, H, W)` uint8 RGB of any size to one `(B, D)` float32 tensor: the class token after the last norm."""

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **kwargs: Any
    ) -> None:
        import timm

        super().__init__(name, features_list)
        assert feature_extractor_weights_path is not None
        published = torch.load(Path(feature_extractor_weights_path), map_location="cpu", weights_only=True)
        published.pop("mask_token", None)  # of training alone
        published["pos_embed"] = resized_positions(published["pos_embed"], SIDE // PATCH)
        self.network: Any = timm.create_model(ARCHITECTURES[name], pretrained=False, img_size=SIDE)
        self.network.load_state_dict(published)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1))

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
        resized = functional.interpolate(images.float(), size=(SIDE, SIDE), mode="bicubic", antialias=True)
        pixels = (resized.round().clamp(0, 255) / 255 - self.mean) / self.std  # (B, 3, 224, 224)
        return (self.network.forward_features(pixels)[:, 0],)


def resized_positions(positions: Tensor, side: int) -> Tensor:
    """(1, 1 + n², D) -> (1, 1 + side², D): the class token's first, the patches' by bicubic interpolation."""
    token, patches = positions[:, :1], positions[:, 1:]
    before = math.isqrt(patches.shape[1])
    if before == side:
        return positions
    grid = patches.unflatten(1, (before, before)).permute(0, 3, 1, 2)  # (1, D, n, n)
    scale = (side + OFFSET) / before
    grid = functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")  # (1, D, side, side)
    return torch.cat([token, grid.flatten(2).transpose(1, 2)], dim=1)
