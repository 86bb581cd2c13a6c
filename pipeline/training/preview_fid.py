"""The Fréchet distance of a few samples, measured while training: a trend, biased by so few images."""

import torch
from torch import Tensor

from common.recipe import Recipe, denoiser_config
from fpdm.latents import to_uint8
from fpdm.weights import assemble
from pipeline.evaluation.metrics import Accumulator, frechet_distance
from pipeline.evaluation.yardstick import Yardstick
from pipeline.sampling.generate import draw_images
from pipeline.sampling.models import Models
from pipeline.sampling.plans import unmeasured
from preprocess.encoding.encoder import Encoder


class PreviewDistance:
    """From the recipe's reference to samples 0 to `train.previews.distance_images - 1` of its seed, drawn as it says.

    `eval_fid.py` measures the same with as many samples of the same weights, where nothing is calibrated. Loads the
    extractor and measures the reference at once; raises UserError where one is missing.
    """

    def __init__(self, recipe: Recipe, vae: Encoder) -> None:
        yardstick = Yardstick(recipe, Models(recipe.vae, recipe.evaluate))
        self.recipe, self.vae = recipe, vae
        self.reference = yardstick.reference_summary.statistics["pooled"]
        self.extractor = yardstick.extractor.network
        self.name = f"{yardstick.extractor.weights.distance_name} of {recipe.train.previews.distance_images} samples"

    def measure(self, weights: dict[str, Tensor]) -> float:
        """`weights`: complete tensors by name. Raises UserError where samples come out non-finite or constant."""
        settings, device = self.recipe.sample, self.extractor.device
        model = assemble(weights, denoiser_config(self.recipe)).to(device).eval()
        way = unmeasured(self.recipe)
        features = Accumulator()
        for indices in torch.arange(self.recipe.train.previews.distance_images, device=device).split(
            settings.batch_size
        ):
            images = draw_images(self.recipe, way, model, self.vae, indices)  # (B, 3, H, W)
            pixels = to_uint8(images, settings.rounding).permute(0, 2, 3, 1).cpu().numpy()
            features.add(self.extractor(pixels)["pooled"])
        return frechet_distance(features.statistics(), self.reference)
