# PYTHON_ARGCOMPLETE_OK
"""Makes averaged weights of any width from a run's stored power-function averages, after training (Karras et al. 2024).

python pipeline/reconstruct_ema.py --config recipes/demo.yaml --width 0.08 train.ema.widths=[0.05,0.1]

The run must have stored some, as these. The more checkpoints' weights there are, the nearer the result; --samples ends
the average earlier. It lies beside the run's own averages: sample.ema=power-0.08 draws from it.
"""

import sys
from pathlib import Path

from common.command import argument_parser, exit_status_of
from common.errors import UserError
from common.recipe import Recipe


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--width", type=float, help="of the average, as a share of the training: 0.08 (needed)")
    parser.add_argument("--samples", type=int, help="training samples at which it ends; the last ones stored")
    arguments = parser.parse_intermixed_args()

    from common.loading import load_recipe
    from common.recipe.training import power_name
    from common.run_folder import weights_folder
    from preprocess.from_data import from_data

    recipe = from_data(load_recipe(arguments.config, arguments.overrides))
    if arguments.width is None:
        raise UserError("--width: missing; the average's share of the training, such as 0.08")
    stored = find_snapshots(recipe)
    end = arguments.samples or max(samples for samples, _ in stored)
    target = weights_folder(recipe, end, power_name(arguments.width))
    factors = coefficients(list(stored), end, arguments.width)
    print(f"plan: {target} from {len(factors)} stored averages", flush=True)
    if target.exists():
        print(f"{target}: exists already")
    elif not arguments.dry_run:
        write(recipe, stored, factors, end, arguments.width)
        print(f"average: {target}")


def find_snapshots(recipe: Recipe) -> dict[tuple[int, float], Path]:
    """(samples seen, width) -> folder of every average that the run stored of `train.ema.widths`.

    Raises UserError where there is none.
    """
    from common.recipe.training import power_name
    from common.run_folder import RunFolder, counted

    weights = RunFolder(recipe.folder).weights
    snapshots = {
        (int(folder.parent.name), width): folder
        for width in recipe.train.ema.widths
        for folder in (samples / power_name(width) for samples in counted(weights))
        if folder.is_dir() and int(folder.parent.name)  # before the first step there is nothing to average
    }
    if not snapshots:
        raise UserError(
            f"train.ema.widths: {weights} holds no power-function averages of the recipe's widths "
            f"{list(recipe.train.ema.widths)}; train with train.ema.widths=[0.05,0.1]"
        )
    return snapshots


def coefficients(stored: list[tuple[int, float]], end: int, width: float) -> dict[tuple[int, float], float]:
    """Coefficients of the stored EMAs whose sum is the EMA of `width` at `end` samples."""
    from fpdm.ema import reconstruction_weights

    usable = [snapshot for snapshot in stored if snapshot[0] <= end]  # what came later holds weights it must not see
    if not usable or max(samples for samples, _ in usable) != end:
        ends = ", ".join(str(samples) for samples in sorted({samples for samples, _ in stored}))
        raise UserError(f"--samples: {end}, but averages are stored after {ends}; choose one of these")
    try:
        factors = reconstruction_weights(usable, (end, width))
    except ValueError as error:
        raise UserError(f"--{error}") from None
    return dict(zip(usable, factors.tolist(), strict=True))


def write(
    recipe: Recipe,
    stored: dict[tuple[int, float], Path],
    factors: dict[tuple[int, float], float],
    end: int,
    width: float,
) -> None:
    """Adds the stored averages up in float64 and writes the sum as weights, with its factors in config.json."""
    from common.recipe.training import power_name
    from common.run_weights import describe, load_network
    from pipeline.training.checkpoint import export_weights

    total = None
    for snapshot, factor in factors.items():
        network = load_network(stored[snapshot])
        weights = {name: factor * value.double() for name, value in network.named_parameters()}
        total = weights if total is None else {name: total[name] + weights[name] for name in total}
    assert total is not None
    notes = [{"samples": samples, "width": one, "factor": factor} for (samples, one), factor in factors.items()]
    run = describe(stored[max(factors)]).extra["run"]
    weights = {name: value.detach().float() for name, value in total.items()}
    export_weights(recipe, weights, end, run, power_name(width), reconstructed_from=notes)


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
