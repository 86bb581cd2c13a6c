"""What is said before the first step of a training that is likely to disappoint."""

from collections.abc import Iterator

from common.recipe import Recipe, wanted_samples
from preprocess.autoencoder.stage import low_psnr

MOST_EPOCHS = 1000
LONGEST_SILENCE = 60.0  # seconds between two lines of the log


def warnings(recipe: Recipe, images: int) -> Iterator[str]:
    """Lines for a person. `images`: training images."""
    epochs = wanted_samples(recipe.train) / images
    if epochs > MOST_EPOCHS:
        yield (
            f"warning: train.total_samples: each of the {images:,} images is seen {epochs:,.0f} times; above "
            f"{MOST_EPOCHS:,} epochs a network mostly repeats them: {MOST_EPOCHS * images:,} samples are enough"
        )
    yield from low_psnr(recipe.vae)


def long_silence(every_samples: int, rate: float) -> str | None:
    """Where the log's next line is far away. `rate`: samples a second."""
    if every_samples <= LONGEST_SILENCE * rate:
        return None
    return (
        f"warning: train.log.every_samples: {every_samples:,} samples are {every_samples / rate / 60:.1f} minutes, "
        f"until the first line of the log; {max(1, round(LONGEST_SILENCE / 2 * rate))} makes one every half minute"
    )
