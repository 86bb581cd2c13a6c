"""Pictures drawn from weights: sample i is a function of (seed, i) alone, whatever the batch, the rank or the chunk."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.errors import UserError
from common.files import shared_folder_lock
from common.ranks import float32_throughout, own_device, rank_and_world_size, share_cores
from common.recipe import Recipe
from common.run_folder import Weights
from common.run_weights import load_network
from common.sealed import write_sealed
from fpdm.denoiser import Denoiser
from fpdm.sampling import require_sound
from pipeline.sampling import outputs
from pipeline.sampling.chunks import Chunk, Span, chunk_spans
from pipeline.sampling.plans import Plan, draw, labels_of, plan
from pipeline.sampling.sample_set import sample_set, total_samples, wanted_weights
from preprocess.encoding.encoder import Encoder, fetch_vae
from preprocess.images.images import to_uint8

WAITING = 4  # batches that are drawn and not yet finished: bounds the memory


def sample(recipe: Recipe, part: int = 0, parts: int = 1) -> None:
    """The stage: what this rank of this part draws of every set that the recipe measures.

    Whoever draws the last chunk of a set also writes what `sample.output` makes of it.
    """
    rank, world_size = rank_and_world_size()
    share_cores()
    fetch_vae(recipe.vae)
    if finished(recipe):
        return
    for weights in wanted_weights(recipe):
        with shared_folder_lock(sample_set(recipe, weights).folder):
            folder = generate(recipe, weights, part * world_size + rank, parts * world_size)
            if not missing_chunks(recipe, weights):
                outputs.finish(recipe, folder)


def finished(recipe: Recipe) -> bool:
    try:
        return all(
            not missing_chunks(recipe, weights) and outputs.finished(recipe, sample_set(recipe, weights).folder)
            for weights in wanted_weights(recipe)
        )
    except UserError:  # no weights yet
        return False


def missing_chunks(recipe: Recipe, weights: Weights) -> list[Span]:
    """The chunks that are still to be drawn, over all ranks."""
    folder = sample_set(recipe, weights).folder
    spans = chunk_spans(total_samples(recipe), recipe.sample.chunk_samples)
    return [span for span in spans if _absent(recipe, folder, span)]


def _absent(recipe: Recipe, folder: Path, span: Span) -> bool:
    return not all(path.exists() for path in outputs.paths(recipe, folder, span))


def generate(recipe: Recipe, weights: Weights, rank: int = 0, world_size: int = 1) -> Path:
    """Draws the chunks of this rank that are not there yet, and returns the set's folder. Chunk k belongs to
    rank k % world_size.

    While one batch is drawn, those before it are rounded, checked, compressed and written by a thread: a GPU need not
    wait for that. Raises UserError where there are no such weights, or where latents or pictures come out non-finite or
    constant.
    """
    fetch_vae(recipe.vae)
    wanted = sample_set(recipe, weights)
    spans = chunk_spans(total_samples(recipe), recipe.sample.chunk_samples)[rank::world_size]
    spans = [span for span in spans if _absent(recipe, wanted.folder, span)]
    if not spans:
        return wanted.folder
    write_sealed(wanted.folder / "settings.json", wanted.settings)
    device = own_device()
    float32_throughout()
    model = load_network(wanted.weights).to(device)
    planned = plan(recipe, wanted.folder, model)
    vae = Encoder(recipe.vae, device)
    keep = outputs.keeper(recipe, wanted.folder)
    total = sum(end - first for first, end in spans)
    with (
        tqdm(total=total, unit="picture", desc=f"sample {wanted.samples_seen}", disable=rank != 0) as bar,
        _in_the_background() as submit,
    ):
        for span in spans:
            batches: list[Chunk] = []
            for start in range(*span, recipe.sample.batch_size):
                index = torch.arange(start, min(start + recipe.sample.batch_size, span[1]), device=device)
                images = draw_images(recipe, planned, model, vae, index)
                submit(partial(_finish, recipe, index, images, batches))
                bar.update(len(index))
            submit(partial(_keep, keep, span, batches))
    return wanted.folder


@contextmanager
def _in_the_background() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Yields `submit`: calls run one after another in a thread; what one raises, the next `submit` or the end raises.

    Where torch has several threads on a CPU the calls run here: two teams of threads would stall one another.
    """
    if not torch.cuda.is_available() and torch.get_num_threads() > 1:
        yield lambda call: call()
        return
    waiting: list[Future[None]] = []
    with ThreadPoolExecutor(1) as pool:

        def submit(call: Callable[[], None]) -> None:
            while len(waiting) >= WAITING or (waiting and waiting[0].done()):
                waiting.pop(0).result()
            waiting.append(pool.submit(call))

        try:
            yield submit
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        for future in waiting:
            future.result()


def draw_images(recipe: Recipe, planned: Plan, model: Denoiser, vae: Encoder, index: torch.Tensor) -> torch.Tensor:
    """Samples `index` (B,) as (B, 3, H, W) in [-1, 1]. Raises UserError for unsound latents, with their count."""
    drawing = draw(recipe, model, "sample", index)
    try:
        latents = drawing(
            num_steps=len(planned.reuse),
            iterations=planned.iterations,
            reuse=planned.reuse,
            tolerance=recipe.sample.tolerance,
        )  # (B, C, h, w)
    except ValueError as error:
        raise _unsound(index, error) from None
    return vae.decode(latents)


def _finish(recipe: Recipe, index: torch.Tensor, images: torch.Tensor, batches: list[Chunk]) -> None:
    """Appends samples `index` (B,), drawn as (B, 3, H, W) in [-1, 1]: images (B, H, W, 3) uint8 and labels (B,)."""
    pixels = to_uint8(images, recipe.sample.rounding)
    try:
        require_sound(images)
        require_sound(pixels)
    except ValueError as error:
        raise _unsound(index, error) from None
    labels = labels_of(recipe, index)
    batches.append({"images": pixels.permute(0, 2, 3, 1).cpu().numpy(), "labels": labels.cpu().numpy()})


def _keep(keep: Callable[[Span, Chunk], None], span: Span, batches: list[Chunk]) -> None:
    keep(span, {name: np.concatenate([batch[name] for batch in batches]) for name in ("images", "labels")})


def _unsound(index: torch.Tensor, error: ValueError) -> UserError:
    return UserError(f"samples {int(index[0])} to {int(index[-1])}: {error}")
