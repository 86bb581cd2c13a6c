# PYTHON_ARGCOMPLETE_OK
"""Judges any set of images: every number with its interval, what moves it and by how much, and why two sets differ.

  python pipeline/judge.py samples/ --reference VIRTUAL_imagenet256_labeled.npz
  python pipeline/judge.py samples.npz --reference train/ --crop center --json > judged.json
  python pipeline/judge.py samples/ --reference train/ --crop center --against their_samples/
  python pipeline/judge.py samples/ --reference reference/ --against judged.json

SAMPLES and the reference are folders of images, zips, tars (WebDataset), npz files (arr_0), sample sets or run folders;
a reference may also be statistics (mu, sigma), or a recipe.yaml, which stands for its training images. docs/judge.md
says how each effect is measured.
"""

import json
import sys

from common.command import Parser, exit_status_of, path_argument


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("samples", type=path_argument, metavar="SAMPLES", help="the images that are judged")
    parser.add_argument(
        "--reference", type=path_argument, required=True, metavar="REF", help="what they are compared with"
    )
    parser.add_argument(
        "--against", type=path_argument, metavar="OTHER", help="another set, or a report (.json) of this command"
    )
    parser.add_argument(
        "--features",
        action="append",
        metavar="NAME[=WEIGHTS]",
        help="extractor; again for further distances. Inception where its weights are here, else efficientnet-lite0",
    )
    parser.add_argument(
        "--crop", metavar="RULE", help="center, short_side, resize or fit: crops the reference's originals"
    )
    parser.add_argument(
        "--probe",
        type=int,
        default=1000,
        metavar="N",
        help="images that changes of pixels are tried on (1000); 0: none",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON, sealed, with the inputs' sha256")
    arguments = parser.parse_args()

    from common.errors import UserError
    from common.ranks import share_cores
    from pipeline.judging.judge import Question, extractor, judge
    from pipeline.judging.report import lines, sealed

    if arguments.probe < 0 or arguments.probe == 1:
        raise UserError(f"--probe: {arguments.probe}; 0, or at least 2 images")
    share_cores()
    question = Question(arguments.samples, arguments.reference, arguments.against, arguments.crop, arguments.probe)
    report = judge(question, [extractor(named) for named in arguments.features or [None]])
    if arguments.json:
        print(json.dumps(sealed(report), indent=1, sort_keys=True))
        return
    for line in lines(report):
        print(line)


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
