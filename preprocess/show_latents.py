# PYTHON_ARGCOMPLETE_OK
"""Draws images beside their decoded latents: look before you train.

    python preprocess/show_latents.py --config recipes/demo.yaml [--count 16] [--out latents.png]

Each pair shows the cropped image, the decoded mean of its latents in `data.shards`, and their PSNR. Writes
`<data.shards>/latents.png` by default.
"""

import sys
from pathlib import Path

from common.command import argument_parser, count_argument, exit_status_of, output_argument


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--count", type=count_argument, default=16, help="images, evenly spaced over the shards (16)")
    parser.add_argument("--out", type=output_argument, metavar="FILE.png", help="where to write it")
    arguments = parser.parse_intermixed_args()

    from common.loading import load_recipe

    recipe = load_recipe(arguments.config, arguments.overrides)
    path = arguments.out or Path(recipe.data.shards) / "latents.png"
    if arguments.dry_run:
        print(f"plan: {arguments.count} images of {recipe.data.images} beside their latents, in {path}")
        return

    from common.files import atomic_write
    from preprocess.encoding.reencode_check import draw_sheet

    sheet, ratios = draw_sheet(recipe, arguments.count)
    with atomic_write(path) as temporary:
        sheet.save(temporary, "png")
    print(f"{path}: {len(ratios)} images, PSNR {min(ratios):.1f} to {max(ratios):.1f} dB")


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
