"""Where things lie in a run folder, `runs/<name>/`. The one home of these names.

recipe.yaml, provenance.jsonl, deepspeed.json, metrics.jsonl, events.jsonl, tensorboard/, logs/,
checkpoints/<samples seen>/, weights/<samples seen>/<average>/, grids/<samples seen>.png,
samples/<samples seen>-<settings key>/, eval/, metrics.json, samples.png, report.html
"""

import re
from pathlib import Path
from typing import Literal

from common.errors import UserError
from common.recipe import Recipe

Weights = Literal["latest"] | int  # which weights: the newest, or those after a number of training samples


def ema_names(recipe: Recipe) -> list[str]:
    """The averages that the run keeps: constant decays as `0.9999`, power functions as `power-0.05`."""
    constant = [f"{decay:g}" for decay in recipe.train.ema.decays]
    return [*constant, *(power_name(width) for width in recipe.train.ema.widths)]


def power_name(width: float) -> str:
    return f"power-{width:g}"


def counted(folder: Path) -> list[Path]:
    """The folders in it that are named by a number of samples as this project writes it, by that number.

    `000000000160.bak`, a copy that somebody keeps beside them, is none.
    """
    found = folder.iterdir() if folder.is_dir() else ()
    named = [path for path in found if re.fullmatch(r"[0-9]{12}|[1-9][0-9]{12,}", path.name) and path.is_dir()]
    return sorted(named, key=lambda path: int(path.name))


def weights_folder(recipe: Recipe, samples_seen: int, ema: str | None = None) -> Path:
    """Holds averaged weights after `samples_seen` training samples, in diffusers' layout; `ema`: the run's first."""
    return recipe.folder / "weights" / f"{samples_seen:012d}" / (ema or ema_names(recipe)[0])


def find_weights(recipe: Recipe, which: Weights, ema: str | None = None) -> tuple[int, Path]:
    """(samples seen, folder) of the exported weights that `which` names: "latest" or a number of samples seen.

    Raises UserError naming what there is.
    """
    name = ema or ema_names(recipe)[0]
    # A folder appears by renaming, so that one which exists is whole.
    folders = counted(recipe.folder / "weights")
    found = [int(folder.name) for folder in folders if (folder / name).is_dir()]
    if not found:
        averages = sorted({path.name for folder in folders for path in folder.glob("[!.]*")})
        if averages:
            raise UserError(
                f"sample.ema: no average {name} in {recipe.folder / 'weights'}; there are {', '.join(averages)} "
                "(pipeline/reconstruct_ema.py makes others of a run with train.ema.widths)"
            )
        raise UserError(f"{recipe.folder / 'weights'}: no weights; run python pipeline/train.py with this recipe first")
    samples_seen = found[-1] if which == "latest" else which
    if samples_seen not in found:
        there = ", ".join(map(str, found))
        raise UserError(
            f"sample.weights: no weights after {samples_seen} samples in {recipe.folder}; there are {there}"
        )
    return samples_seen, weights_folder(recipe, samples_seen, name)
