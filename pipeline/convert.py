# PYTHON_ARGCOMPLETE_OK
"""Turns a DiT, published or trained here, into an FPDM of its width, from which training can begin.

    python pipeline/convert.py runs/dit/weights/000000020480/0.995 --out converted
    python pipeline/convert.py DiT-XL-2-256x256.pt --out converted --injection decay

    python pipeline/train.py --config RECIPE.yaml train.initial_weights=converted

WEIGHTS is what pipeline/import_weights.py reads too: .pt, .safetensors, a folder of weights of a run, or of diffusers'.
The first and last blocks are kept, one between them is iterated. It draws well only once trained.
"""

import argparse
import sys
from pathlib import Path

from common.command import Parser, exit_status_of, path_argument
from common.errors import UserError


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("weights", type=path_argument, metavar="WEIGHTS", help="of the DiT: a file or a folder")
    parser.add_argument("--out", type=path_argument, required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument(
        "--weights", choices=["ema", "model"], default="ema", dest="which", help="of a checkpoint (ema)"
    )
    parser.add_argument("--pre-depth", type=int, default=1, metavar="N", help="first blocks that are kept (1)")
    parser.add_argument("--post-depth", type=int, default=1, metavar="N", help="last blocks that are kept (1)")
    parser.add_argument(
        "--injection", choices=["concat", "decay"], default="concat", help="as model.injection (concat)"
    )
    parser.add_argument(
        "--block", type=int, metavar="N", help="the block that is iterated, from 0 (at a quarter of those between)"
    )
    arguments = parser.parse_args()
    return exit_status_of(lambda: convert(arguments))


def convert(arguments: argparse.Namespace) -> None:
    """Raises UserError where the weights cannot be read or converted, or the folder exists."""
    from common.files import atomic_folder
    from fpdm.conversion import fpdm_from_dit
    from fpdm.importing import import_checkpoint
    from fpdm.weights import save_pretrained

    source, out = arguments.weights, arguments.out
    if out.exists():
        raise UserError(f"--out: {out} exists already; name a new folder")
    try:
        dit, report = import_checkpoint(source, weights=arguments.which)
        model = fpdm_from_dit(
            dit,
            pre_depth=arguments.pre_depth,
            post_depth=arguments.post_depth,
            injection=arguments.injection,
            block=arguments.block,
        )
        extra = {**known_of(source), "converted_from": source.name}
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: {error}") from None
    with atomic_folder(out) as folder:
        save_pretrained(model.state_dict(), model.config, folder, extra)
    config = model.config
    print(f"{report}")
    print(
        f"{out}: next: python pipeline/train.py with train.initial_weights={out} model.kind=fpdm "
        f"model.pre_depth={config.pre_depth} model.post_depth={config.post_depth} model.injection={config.injection} "
        "model.pre_post_timestep_conditioning=true"
    )


def known_of(source: Path) -> dict[str, object]:
    """What a run's weights say of their training, which `train.initial_weights` compares with the recipe."""
    from fpdm.diffusers_folders import CONFIG_NAME
    from fpdm.weights import CLASS_NAME, read_class, read_extra

    if not (source / CONFIG_NAME).is_file() or read_class(source) != CLASS_NAME:
        return {}
    extra = read_extra(source)
    return {name: extra[name] for name in ("objective", "label_dropout") if name in extra}


if __name__ == "__main__":
    sys.exit(main())
