"""The autoencoder and the extractor that a recipe names, each found and hashed once, when it is first needed."""

from functools import cached_property

import torch

from common.errors import UserError
from common.recipe import VAE, Evaluate
from pipeline.features.extractors import NamedExtractor
from preprocess.encoding.encoder import Encoder, Identity, find_identity


class Models:
    """Shared by all sets of samples that differ in how they are drawn alone, such as the points of a sweep."""

    def __init__(self, vae: VAE, evaluate: Evaluate) -> None:
        self._vae, self._evaluate = vae, evaluate

    @cached_property
    def vae(self) -> Identity:
        """Raises UserError where the autoencoder is not on this machine, or not as the recipe describes it."""
        identity = find_identity(self._vae)
        if identity is None:
            raise UserError(f"vae.path: {self._vae.path} is not here; python preprocess/encode_latents.py downloads it")
        return identity

    @cached_property
    def extractor(self) -> NamedExtractor:
        """Raises UserError where a file of weights that the recipe names is missing."""
        return NamedExtractor(self._evaluate)

    def load_vae(self, device: torch.device | None = None) -> Encoder:
        return Encoder(self._vae, device, self.vae)
