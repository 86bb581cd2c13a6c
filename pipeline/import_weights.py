# PYTHON_ARGCOMPLETE_OK
"""Takes a published checkpoint of DiT or FPDM into a run, which is then sampled and measured as one trained here.

python pipeline/import_weights.py --config recipes/imagenet256.yaml --checkpoint DiT-XL-2-256x256.pt \\
    name=dit-xl-2 model.kind=dit objective.prediction=epsilon objective.zero_terminal_snr=false

--checkpoint is a file, or a folder of diffusers' such as facebook/DiT-XL-2-256's.
The recipe says what the file cannot: what the network predicts. What it says of the network is compared with the
tensors. --weights model takes a training checkpoint's raw weights instead of its average.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.command import argument_parser, exit_status_of, path_argument
from common.errors import UserError
from common.recipe import Recipe, denoiser_config, describe_network, wanted_samples


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--checkpoint", type=path_argument, metavar="FILE", help=".pt, .safetensors, or a folder of diffusers' (needed)"
    )
    parser.add_argument("--weights", choices=["ema", "model"], default="ema", help="of a training checkpoint (ema)")
    arguments = parser.parse_intermixed_args()

    from common.loading import load_recipe
    from common.run_folder import RunFolder, weights_folder
    from preprocess.from_data import from_data

    recipe = from_data(load_recipe(arguments.config, arguments.overrides))
    print(f"plan: {describe_network(recipe)}", flush=True)
    if arguments.checkpoint is None:
        raise UserError("--checkpoint: missing; the file to import, such as DiT-XL-2-256x256.pt")
    folder = RunFolder(recipe.folder)
    if folder.weights.exists() or folder.checkpoints.exists():
        raise UserError(f"name: {recipe.folder} has weights already; import into another run, name=...")
    target = weights_folder(recipe, wanted_samples(recipe.train))
    print(f"plan: {arguments.checkpoint} to {target}", flush=True)
    if not arguments.dry_run:
        take(recipe, arguments.checkpoint, arguments.weights)


def take(recipe: Recipe, path: Path, weights: str) -> None:
    """Writes the file's tensors as the weights after `train.total_samples` samples.

    Raises UserError where the file is no checkpoint, or another network's than the recipe's.
    """
    from fpdm.config import differing_field
    from fpdm.importing import import_checkpoint
    from pipeline.training.checkpoint import export_weights

    wanted = denoiser_config(recipe)
    stated: dict[str, Any] = {  # which no shape shows
        "num_heads": wanted.num_heads,
        "pre_post_timestep_conditioning": wanted.pre_post_timestep_conditioning,
        "norm": wanted.norm,
        "rope": wanted.rope,
        # A gated MLP's width is rounded, so that several ratios have one shape.
        **({"mlp_ratio": wanted.mlp_ratio} if wanted.mlp == "swiglu" else {}),
    }
    try:
        model, report = import_checkpoint(path, weights="model" if weights == "model" else "ema", **stated)
    except (OSError, ValueError) as error:
        raise UserError(f"--checkpoint: {error}") from None
    if field := differing_field(wanted, model.config):
        imported, value = getattr(model.config, field), getattr(wanted, field)
        raise UserError(f"--checkpoint: {path} has {field} {imported}, the recipe makes it {value}; change the recipe")
    config = replace(wanted, self_conditioned=model.config.self_conditioned)
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    export_weights(recipe, parameters, wanted_samples(recipe.train), config=config, imported_from=path.name)
    print(f"{report}; next: python pipeline/sample.py with the same recipe and overrides")


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
