"""Reads a run's exported weights: their metadata and the network, after verifying checksums."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, with_config
from typing_extensions import TypedDict

from common.errors import UserError
from common.recipe import Recipe
from common.run_folder import RunFolder, counted, weights_folder
from common.sealed import OPEN, checked
from fpdm.config import DenoiserConfig
from fpdm.denoiser import Denoiser
from fpdm.diffusers_folders import CONFIG_NAME
from fpdm.weights import load_pretrained, read_config, read_extra, weights_sha256

Weights = Literal["latest"] | int  # which weights: the newest, or those after a number of training samples

REMEDY = (
    "move the folder aside, and run python pipeline/train.py, which writes a run's last weights again from its last "
    "checkpoint; without that, take others (sample.weights)"
)
UNSEALED = "python pipeline/import_weights.py takes it as it is, into a run of another name"


@with_config(OPEN)
class ExtraForm(TypedDict):
    """Beside the network's own settings in config.json (`pipeline.training.checkpoint.export_weights`)."""

    objective: dict[str, Any]
    label_dropout: Annotated[float, Field(ge=0, le=1)]
    seconds: NotRequired[Annotated[float, Field(ge=0)]]  # trained, of a run with train.max_hours
    run: dict[str, Any] | None  # identity of the run that trained them; None of imported ones


@dataclass(frozen=True)
class Description:
    config: DenoiserConfig
    extra: ExtraForm
    sha256: str  # of the tensors; they are compared with it when they are loaded


def describe(folder: Path) -> Description:
    """Raises UserError where config.json is not as it was written, or by another program."""
    try:
        config, extra, sha256 = read_config(folder), read_extra(folder), weights_sha256(folder)
    except ValueError as error:
        raise UserError(f"{error}; {REMEDY}") from None
    if sha256 is None:
        raise UserError(f"{folder / CONFIG_NAME}: has no seal, which all weights of a run have; {UNSEALED}")
    return Description(config, checked(extra, f"{folder / CONFIG_NAME}: extra", ExtraForm, REMEDY), sha256)


def load_network(folder: Path) -> Denoiser:
    """In float32. Raises UserError where anything in the folder is not as it was written."""
    describe(folder)
    try:
        return load_pretrained(folder).float().eval()
    except ValueError as error:
        raise UserError(f"{error}; {REMEDY}") from None


def find_weights(recipe: Recipe, which: Weights, ema: str | None = None) -> tuple[int, Path]:
    """(samples seen, folder) of the exported weights that `which` names: "latest" or a number of samples seen.

    Raises UserError naming what there is.
    """
    name = ema or recipe.train.ema.names[0]
    weights = RunFolder(recipe.folder).weights
    folders = counted(weights)  # each appears by renaming: all that exist are complete
    available = [int(folder.name) for folder in folders if (folder / name).is_dir()]
    if not available:
        averages = sorted({path.name for folder in folders for path in folder.glob("[!.]*")})
        if averages:
            raise UserError(
                f"sample.ema: no average {name} in {weights}; there are {', '.join(averages)} "
                "(pipeline/reconstruct_ema.py makes others of a run with train.ema.widths)"
            )
        raise UserError(f"{weights}: no weights; run python pipeline/train.py with this recipe first")
    samples_seen = available[-1] if which == "latest" else which
    if samples_seen not in available:
        listed = ", ".join(map(str, available))
        raise UserError(
            f"sample.weights: no weights after {samples_seen} samples in {recipe.folder}; there are {listed}"
        )
    return samples_seen, weights_folder(recipe, samples_seen, name)
