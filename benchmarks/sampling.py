"""How near to a network's limit its samples come with few blocks: by a fitted sampler, and the paper's way with more.

    python benchmarks/sampling.py runs/demo/weights/000000229376/0.995 [--budgets 40 80 160] [--shares 0.5 0.4 0.3]

The limit is what the network itself draws from the same noise with many steps and iterations. An error is the distance
of the latents to it, relative to its norm: the mean over the samples, by which ways are compared, and the median. It
says how well the sampler solves the network's equations, not how good the images are.
  paper   DDIM, evenly spaced, reuse: the best of several iterations a step, constant or a ramp, chosen on the samples
          that judge, in its favour
  fitted  what `sample.allocation: calibrated` finds at this share of those blocks, fitted to other samples
"""

import sys
import time
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from common.command import Parser, count_argument, exit_status_of
from common.errors import UserError
from fpdm import (
    Denoiser,
    Diffusion,
    SamplerSettings,
    Way,
    allocate,
    calibrate,
    load_pretrained,
    read_extra,
    sample,
)
from fpdm.calibration import Draw, distances, limit_way
from fpdm.sampling import sample_noise

ITERATIONS = (1, 2, 3, 5, 8)  # a step, of the paper's way
COLUMNS = ("blocks", "paper", "mean", "median", "blocks", "fitted", "mean", "median", "seconds")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("weights", help="folder with config.json and the weights")
    parser.add_argument("--budgets", type=count_argument, nargs="+", default=[40, 80, 160], help="blocks an image")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.4, 0.3], help="of them, of the fitted one")
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--samples", type=count_argument, default=128, help="that judge; as many are fitted to")
    arguments = parser.parse_args()
    if arguments.samples < 2:
        parser.error(f"--samples: {arguments.samples}; 2 at least")
    if bad := [share for share in arguments.shares if not 0 < share <= 1]:
        parser.error(f"--shares: {bad[0]:g} is not above 0 and at most 1")
    model, diffusion = loaded(arguments.weights)
    config, device = model.config, model.pos_embed.device
    samples, guided = arguments.samples, arguments.guidance_scale != 1

    def bind(index: Tensor) -> Draw:
        index = index.to(device)
        noise = sample_noise(0, index, (config.in_channels, config.input_size, config.input_size), stream="benchmark")
        labels = index % config.num_classes
        return partial(sample, model, diffusion, noise, labels, guidance_scale=arguments.guidance_scale)

    def drawn(way: Way) -> Tensor:  # of the samples that judge
        index = torch.arange(2 * samples, 3 * samples)
        return torch.cat([bind(part)(**vars(way)) for part in index.split(32)])

    limit = limit_way(diffusion)
    reference = drawn(limit)

    @cache
    def errors(way: Way) -> tuple[float, float]:  # the mean first, by which ways are compared
        each = distances(drawn(way), reference)  # (samples,)
        return float(each.mean()), float(each.median())

    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for blocks in arguments.budgets:
        outer = config.blocks(0)
        paper = best_of_paper(blocks // (1 + guided), outer, errors)
        for share in arguments.shares:
            began, budget = time.monotonic(), round(blocks * share) // (1 + guided)
            start = paper_way("constant", max(1, budget // (outer + 2)), budget, outer)
            found = calibrate(bind, diffusion, start, outer_depth=outer, samples=samples, limit=limit).way
            numbers = [[f"{value:.3f}" for value in errors(way)] for way in (paper, found)]
            cells = [str(blocks), named(paper), *numbers[0], str(budget * (1 + guided)), named(found), *numbers[1]]
            print(f"| {' | '.join(cells)} | {time.monotonic() - began:.0f} |", flush=True)


def loaded(weights: str) -> tuple[Denoiser, Diffusion]:
    """In float32, on a GPU where there is one. Raises UserError where the folder holds none."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return load_pretrained(weights).float().to(device), Diffusion(**read_extra(weights)["objective"])
    except ValueError as error:
        raise UserError(f"WEIGHTS: {error}") from None


def best_of_paper(budget: int, outer: int, errors: Callable[[Way], tuple[float, float]]) -> Way:
    steps = dict.fromkeys(max(1, budget // (iterations + outer)) for iterations in ITERATIONS)
    constant = min((paper_way("constant", each, budget, outer) for each in steps), key=errors)
    ramps = (paper_way(kind, constant.num_steps, budget, outer) for kind in ("more_at_noise", "more_at_data"))
    return min(constant, *ramps, key=errors)


def paper_way(kind: str, num_steps: int, budget: int, outer: int) -> Way:
    counts = allocate(kind, num_steps, block_budget=budget, outer_depth=outer)
    settings = SamplerSettings()
    return Way(sampler="ddim", sampler_settings=settings, num_steps=num_steps, iterations=tuple(counts), reuse=True)


def named(way: Way) -> str:
    assert way.iterations is not None
    ramp = way.iterations[0] - way.iterations[-1]
    spread = "" if abs(ramp) <= 1 else ", more at noise" if ramp > 0 else ", more at data"
    return f"{way.sampler}, {way.num_steps} x {sum(way.iterations) / way.num_steps:.2g}{spread}"


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
