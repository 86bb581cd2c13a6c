"""What a run leaves on disk, by kind, from its recipe and the number of its images."""

from common.recipe import Recipe, Train, denoiser_config
from fpdm.denoiser import count_parameters
from pipeline.evaluation.statistics import KEPT
from pipeline.features.extractors import WIDTHS, layers_of, wanted_layers
from pipeline.sampling.iterates import ITERATIONS, OF_THE_STEPS, SHOWN
from pipeline.training.identity import total_samples
from preprocess.demo.portraits import CLASSES, parts
from preprocess.encoding.encoding import sample_bytes

LOGITS = 1008  # of Inception
PORTRAIT = 0.375  # of the demo's, what compression leaves
PNG = 0.8  # of an image's pixels, what compression leaves of photographs at most
TEXT = 2e6  # logs, tables and the recipe


def disk(recipe: Recipe, images: int) -> dict[str, float]:
    """Bytes when all stages are finished. `num_classes` and the length of the training must be resolved."""
    return {
        **({"images": 3 * recipe.data.resolution**2 * PORTRAIT * portraits(recipe)} if recipe.demo else {}),
        "latents": images * sample_bytes(recipe),
        "checkpoints": min(saves(recipe.train), _kept(recipe.train)) * checkpoint_bytes(recipe),
        "weights": (saves(recipe.train) + 1) * weights_bytes(recipe),
        "samples": _samples(recipe),
        "evaluation": _statistics(recipe, images),
        "report and logs": TEXT + _shown(recipe),
    }


def portraits(recipe: Recipe) -> int:
    """That the demo composes."""
    return sum(part.per_class * len(CLASSES) for part in parts(recipe))


def saves(train: Train) -> int:
    """Checkpoints that a run writes, with the last one; each has its weights."""
    return (total_samples(train) - 1) // train.checkpoint.every_samples + 1


def checkpoint_bytes(recipe: Recipe) -> int:
    """In fp32: parameters, Adam's moments (Muon's are fewer), averages."""
    return 4 * count_parameters(denoiser_config(recipe)) * (3 + len(recipe.train.ema.names))


def weights_bytes(recipe: Recipe) -> int:
    """Of all averages, in fp32."""
    return 4 * count_parameters(denoiser_config(recipe)) * len(recipe.train.ema.names)


def _kept(train: Train) -> int:
    """With those that are kept for good."""
    every = train.checkpoint.keep_every_samples
    return train.checkpoint.keep + (total_samples(train) // every if every else 0)


def _samples(recipe: Recipe) -> float:
    """Images, features and iterates of all sets."""
    settings, image = recipe.sample, 3 * recipe.data.resolution**2
    count, sets = settings.num_samples * recipe.evaluate.seed_ranges, 1 + recipe.evaluate.untrained_baseline
    images = {"chunks": 1.0, "features": 0.0, "webdataset": PNG, "npz": 2.0, "folder": 1 + PNG}[settings.output]
    extractor, layers = recipe.evaluate.feature_extractor, wanted_layers(recipe.evaluate)
    width = sum(WIDTHS.get((extractor, layer), LOGITS) for layer in layers)
    iterates = SHOWN * (len(ITERATIONS) + len(OF_THE_STEPS)) * image * (recipe.model.kind == "fpdm")
    return sets * count * (images * image + 4 * width) + iterates


def _statistics(recipe: Recipe, images: int) -> float:
    """Means, covariances and rows of the reference, and of held-out images and their reconstructions."""
    extractor = recipe.evaluate.feature_extractor
    fitted = [WIDTHS[extractor, layer] for layer in layers_of(extractor) if (extractor, layer) in WIDTHS]
    compared = images if recipe.evaluate.reference_samples is None else recipe.evaluate.reference_samples
    sets = [compared] if recipe.evaluate.reference is None else []
    if recipe.data.held_out is not None:
        sets += [recipe.sample.num_samples] * (1 if recipe.vae.path is None else 2)
    return sum(8 * sum(width**2 for width in fitted) + 4 * min(count, KEPT) * fitted[0] for count in sets)


def _shown(recipe: Recipe) -> float:
    """samples.png, and in base64 report.html: real images, samples, and the images nearest to them."""
    sets = 3 + recipe.evaluate.untrained_baseline
    return sets * recipe.sample.save_images * 3 * recipe.data.resolution**2 * PNG * (1 + 4 / 3)
