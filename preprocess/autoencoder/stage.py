"""The stage `autoencoder`, of recipes with a section `vae.training`. Importing it takes no time."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from common.recipe import VAE, Recipe, latent_shape
from common.stage import Input, Stage, the_recipe

if TYPE_CHECKING:
    from diffusers.models import AutoencoderKL

    from preprocess.autoencoder.images import Images
    from preprocess.autoencoder.progress import Progress

DECODER_IMAGES = "vae.training.decoder_images"
TEACHER = "efficientnet-lite2"  # of the decoder alone; Lite0 measures the demo
DECODER_COST = 1.1  # seconds of a step that trains the decoder alone, in those of one that trains all weights
DECODER_LOSS = 1.5  # dB of PSNR that its sharpness may cost
LOWEST_PSNR = 26.0  # dB; below it samples cannot be sharp, whatever the denoiser learns


def plan(recipe: Recipe) -> Iterator[str]:
    """Checks the images and the folder; writes nothing."""
    if recipe.vae.training is None:
        raise UserError(
            "vae.training: null, so that the autoencoder in vae.path is used as it is; to train one, set how many "
            "images it sees, such as vae.training.images=16000, and vae.path to a new folder"
        )
    from preprocess.autoencoder import training

    _settings(recipe)  # names what is missing
    network = training.start(recipe)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    shape = " x ".join(map(str, latent_shape(recipe)))
    yield f"autoencoder: {parameters:,} parameters, {recipe.data.resolution} px to {shape}"
    of, images, decoder_images = recipe.data.images, recipe.vae.training.images, recipe.vae.training.decoder_images
    if images:
        yield f"to see: {images:,} images of {of}"
    if decoder_images:
        teacher_weights()
        yield f"its decoder alone{', after that' if images else ''}: {decoder_images:,} images of {of}"
    yield f"result: {recipe.vae.path}, {'trained' if finished(recipe) else 'to be trained'}"


def finished(recipe: Recipe) -> bool:
    from preprocess.autoencoder import export

    try:
        settings = _settings(recipe)
    except UserError:  # images or first weights are not there; the stage says what
        return False
    return export.finished(recipe.vae, settings)


def train(recipe: Recipe) -> None:
    from common.files import folder_lock

    place = recipe.vae.folder
    with folder_lock(place.parent, f".{place.name}.lock", place=str(place)):
        if not finished(recipe):
            _train(recipe)


def _train(recipe: Recipe) -> None:
    from common.ranks import share_cores
    from preprocess.autoencoder.export import export
    from preprocess.autoencoder.images import load_images
    from preprocess.autoencoder.progress import Progress
    from preprocess.autoencoder.training import measure

    share_cores()
    images, settings = load_images(recipe), _settings(recipe)
    as_whole = {name: value for name, value in settings.items() if name != DECODER_IMAGES}
    kept = Progress(recipe.vae.folder, as_whole), Progress(recipe.vae.folder, settings, ".decoder")
    vae, seconds = trained(recipe, images, kept)
    measured: dict[str, Any] = measure(vae, images.held_out)
    counts = {"training": len(images.training), "held_out": len(images.held_out)}
    export(recipe, vae, settings, measured | counts | {"minutes": seconds / 60})
    for progress in kept:
        progress.remove()
    print(f"autoencoder: {measured['psnr']:.2f} dB PSNR on {counts['held_out']} held-out images, in {recipe.vae.path}")
    for line in low_psnr(recipe.vae):
        print(line, flush=True)


def trained(recipe: Recipe, images: "Images", kept: Sequence["Progress"]) -> tuple["AutoencoderKL", float]:
    """The autoencoder and the seconds that its training took: as a whole, then of its decoder, each if wanted.

    kept: the progress of each.
    """
    from collections import deque

    from preprocess.autoencoder import decoder, loop, training

    def batch(step: int) -> Any:
        return images.batch(step, loop.BATCH_SIZE)

    assert recipe.vae.training is not None
    seconds = further = 0.0
    if recipe.vae.training.images:
        ((average, seconds),) = deque(loop.run(training.whole(recipe, batch), progress=kept[0]), maxlen=1)
        vae = training.finish(average, images.statistics)
    else:
        vae = training.start(recipe)
    if recipe.vae.training.decoder_images:
        ((average, further),) = deque(loop.run(decoder.decoder(recipe, vae, batch), progress=kept[1]), maxlen=1)
        vae = training.rounded(average)
    return vae, seconds + further


def teacher_weights() -> Path:
    """Raises UserError where they are not installed, or are others."""
    from common.efficientnet import published_weights

    return published_weights(TEACHER, DECODER_IMAGES)


def low_psnr(vae: VAE) -> list[str]:
    """A warning where the autoencoder's measured PSNR is low; none for one that this project did not measure."""
    from preprocess.autoencoder.export import read_measured

    measured = None if vae.path is None else read_measured(vae.path)
    if measured is None:
        return []
    lowest = LOWEST_PSNR - DECODER_LOSS * bool(measured["settings"].get(DECODER_IMAGES))
    if measured["psnr"] >= lowest:
        return []
    return [
        f"warning: vae.path: {vae.path} returns held-out images with a PSNR of {measured['psnr']:.1f} dB, below "
        f"{lowest:g}: no sample can be sharper; train it longer (vae.training.images)"
    ]


def _settings(recipe: Recipe) -> dict[str, Any]:
    """All that decides the weights, JSON-able. Raises UserError where the weights to start from are not there."""
    from common.efficientnet import installed_weights
    from common.files import sha256_file
    from fpdm.diffusers_folders import weight_files
    from preprocess.sources import fingerprint, open_source

    training, data, vae = recipe.vae.training, recipe.data, recipe.vae
    assert training is not None
    if training.decoder_images:
        installed_weights(TEACHER, DECODER_IMAGES)
    try:
        start = [sha256_file(path) for path in weight_files(Path(training.start))[0]] if training.start else None
    except ValueError as error:
        raise UserError(f"vae.training.start: {error}") from None
    return {
        "vae.training.images": training.images,
        "vae.training.start": start,
        "vae.training.kl_weight": training.kl_weight,
        **({DECODER_IMAGES: training.decoder_images} if training.decoder_images else {}),
        "vae.latent_channels": vae.latent_channels,
        "vae.downsampling": vae.downsampling,
        "seed": recipe.seed,
        "data.crop": data.crop,
        "data.resolution": data.resolution,
        "data.flips": data.flips,
        "data.images": fingerprint(open_source(data)),
        "data.held_out": None if data.held_out is None else fingerprint(open_source(data, "held_out")),
    }


STAGE = Stage(
    name="autoencoder",
    resolve=the_recipe,
    plan=plan,
    finished=finished,
    work=train,
    inputs=(Input(_settings, ("compose",)),),
    wanted=lambda recipe: recipe.vae.training is not None,
    place=lambda recipe: recipe.vae.path,
)
