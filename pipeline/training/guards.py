"""What stops a training that has gone wrong, before it harms the weights or a checkpoint."""

import math
import statistics
from collections import deque
from typing import Any

from common.errors import UserError
from common.recipe import Recipe

WINDOW = 100  # steps whose losses say what is usual
FEWEST = 20  # steps without which nothing is said


class SpikeDetector:
    """Tells a loss that lies far above those of the last steps; a spike is not counted among what is usual."""

    def __init__(self, deviations: float | None, recent: list[float]) -> None:
        """`deviations`: how many standard deviations are far; None: never. `recent`: from a checkpoint."""
        self.deviations, self.recent = deviations, deque(recent, maxlen=WINDOW)

    def check(self, loss: float) -> float | None:
        """How many standard deviations this step's loss lies above the mean, if that is too many."""
        if self.deviations is not None and len(self.recent) >= FEWEST:
            mean, spread = statistics.fmean(self.recent), statistics.stdev(self.recent)
            above = (loss - mean) / max(spread, 1e-12 * abs(mean), 1e-30)
            if above > self.deviations:
                return above
        self.recent.append(loss)
        return None


def describe_fault(recipe: Recipe, samples_seen: int, loss: float, norm: float, samples: list[int]) -> dict[str, Any]:
    """The event of a step that started at `samples_seen` and whose loss or gradient is not finite.

    `samples`: those of the data set whose own loss is not finite, over all ranks.
    """
    return {
        "samples": samples_seen + recipe.train.batch_size,
        "step": samples_seen // recipe.train.batch_size + 1,
        "event": "not finite",
        "loss": loss if math.isfinite(loss) else None,
        "gradient_norm": norm if math.isfinite(norm) else None,
        "sample_ids": samples,
    }


def fault_error(recipe: Recipe, event: dict[str, Any], skipped: int) -> UserError:
    """What ends the training after such an event; `skipped` steps in a row before it were passed over."""
    what = "gradient" if event["loss"] is not None else "loss"
    ids = event["sample_ids"]
    if 0 < len(ids) <= recipe.train.batch_size / 2:
        named = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
        cause = f"samples {named} of {recipe.data.shards}; look at them"
    else:
        cause = f"no single sample; lower train.optimizer.learning_rate from {recipe.train.optimizer.learning_rate}"
    passed = f" after {skipped} skipped steps in a row" if skipped else ""
    return UserError(
        f"{recipe.folder}: step {event['step']}: the {what} is not finite{passed}, through {cause}; this step updated "
        "nothing and nothing was saved since (train.max_skipped_steps passes over such steps)"
    )


def spike_event(recipe: Recipe, samples_seen: int, loss: float, deviations: float) -> dict[str, Any]:
    """The event of a step that started at `samples_seen` and whose loss lies far above the usual."""
    return {
        "samples": samples_seen + recipe.train.batch_size,
        "step": samples_seen // recipe.train.batch_size + 1,
        "event": "loss spike",
        "loss": loss,
        "deviations": round(deviations, 2),
        "stream": [samples_seen, samples_seen + recipe.train.batch_size],
    }
