# PYTHON_ARGCOMPLETE_OK
"""Writes a run's weights as a diffusers pipeline, which loads where this project is not installed; shares it.

  python pipeline/export.py --config recipes/demo.yaml
  python pipeline/export.py --config recipes/demo.yaml --push me/demo --license cc-by-4.0 --data-license "CC0"

Into `pipeline/` of the run folder: model_index.json, pipeline.py (the code), transformer/, vae/, scheduler/, README.md
(the model card), samples.png and recipe.yaml, whose paths are those of this machine. --push uploads all of it to
huggingface.co, as whoever is logged in there (hf auth login).
"""

import re
import sys
from argparse import Namespace

from common.command import argument_parser, exit_status_of
from common.errors import UserError
from common.run_folder import RunFolder

PLAIN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--push", metavar="USER/REPO", help="upload the pipeline to this repository of huggingface.co")
    parser.add_argument("--private", action="store_true", help="with --push: a new repository is private")
    parser.add_argument("--license", default="unknown", help="of the weights, in the hub's words, as apache-2.0")
    parser.add_argument("--data-license", default="", metavar="TEXT", help="a line on the data: whose, and its licence")
    parser.add_argument("--half", action="store_true", help="weights in float16: half the size")
    arguments = parser.parse_intermixed_args(argv)

    check(arguments)

    from common.loading import load_recipe
    from common.recipe import describe_network
    from pipeline.exporting.export import export
    from pipeline.exporting.model_card import Licences
    from pipeline.exporting.push import push
    from pipeline.sampling.sample_set import sample_set
    from preprocess.from_data import from_data

    recipe = from_data(load_recipe(arguments.config, arguments.overrides))
    print(f"plan: {describe_network(recipe)}")
    print(f"plan: weights: {sample_set(recipe, recipe.sample.weights).weights}")
    print(f"plan: pipeline: {RunFolder(recipe.folder).pipeline}", flush=True)
    if arguments.push:
        print(f"plan: upload: https://huggingface.co/{arguments.push}", flush=True)
    if not arguments.dry_run:
        export(recipe, Licences(arguments.license, arguments.data_license), arguments.push, half=arguments.half)
        if arguments.push:
            push(RunFolder(recipe.folder).pipeline, arguments.push, arguments.private)


def check(arguments: Namespace) -> None:
    """Raises UserError for arguments that the hub would refuse after all the work."""
    if arguments.push is not None and not re.fullmatch(f"{PLAIN}/{PLAIN}", arguments.push):
        raise UserError(f"--push: {arguments.push!r} is no USER/REPO of letters, digits, '.', '_' and '-'")
    if arguments.private and not arguments.push:
        raise UserError("--private: goes with --push USER/REPO; leave it out")
    if not re.fullmatch(PLAIN, arguments.license):
        raise UserError(f"--license: {arguments.license!r}; write the hub's identifier of a licence, as apache-2.0")


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
