"""The steps of an autoencoder's training: counted, averaged over, kept from time to time."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from diffusers.models import AutoencoderKL
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from common.errors import UserError
from common.ranks import own_device
from preprocess.autoencoder.progress import Progress

BATCH_SIZE = 8
WARMUP_STEPS = 200
EMA_DECAY = 0.998


@dataclass(frozen=True)
class Phase:
    """What is trained, and by which steps."""

    name: str
    vae: AutoencoderKL
    steps: int
    one_step: Callable[[int], float]  # trains `vae` in place and returns the loss
    parts: dict[str, Any]  # what else has a state to go on from


def learning_rate(step: int, steps: int) -> float:
    """In parts of the largest: it rises over the first steps, a tenth of them at most, and falls to 0."""
    warm_up = max(1, min(WARMUP_STEPS, steps // 10))
    return min(1, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))


def run(
    phase: Phase, *, progress: Progress | None = None, quiet: bool = False
) -> Iterator[tuple[AutoencoderKL, float]]:
    """Yields the averaged autoencoder after every step, and the seconds that its steps took.

    progress: where a training goes on that was interrupted.
    """
    steps = phase.steps
    decay = min(EMA_DECAY, 1 - min(1.0, 10 / steps))  # averages over a tenth of a short training
    average = AveragedModel(phase.vae, multi_avg_fn=get_ema_multi_avg_fn(decay))
    first, before, began = 0, 0.0, time.monotonic()
    parts = {"vae": phase.vae, "average": average, **phase.parts}
    if progress is not None and (kept := progress.read(own_device())) is not None:
        first, before = kept["step"], kept["seconds"]
        for name, part in parts.items():
            part.load_state_dict(kept[name])
    between = 0.5 if sys.stderr.isatty() else 30  # seconds between two lines of the bar
    bar = tqdm(total=steps, initial=first, unit="step", desc=phase.name, mininterval=between, disable=quiet)
    for step in range(first, steps):
        loss = phase.one_step(step)
        if not math.isfinite(loss):
            raise UserError(
                f"vae.training: the loss of the {phase.name}'s step {step} is not finite, and nothing is "
                "exported; choose another seed, or other images"
            )
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        average.update_parameters(phase.vae)
        bar.update()
        seconds = before + time.monotonic() - began
        if progress is not None and (progress.is_due or step + 1 == steps):
            states = {name: part.state_dict() for name, part in parts.items()}
            progress.write({"step": step + 1, "seconds": seconds, **states})
        yield cast(AutoencoderKL, average.module), seconds
    bar.close()
    if first == steps:  # killed after its end
        yield cast(AutoencoderKL, average.module), before
