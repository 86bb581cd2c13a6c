"""How near to a network's limit its samples come, at equal blocks: the paper's way and the calibrated one.

    python benchmarks/sampling.py runs/demo/weights/000000229376/0.995 [--budgets 40 80 160] [--guidance-scale 1]

The limit is what the network itself draws from the same noise with many steps and iterations. An error is the distance
of the latents to it, relative to its norm: the mean over the samples, by which ways are compared, and the root mean
square, which is a matter of the few samples whose paths part. It says how well the sampler solves the network's
equations, not how good the images are.
  paper       DDIM, evenly spaced, reuse: the best of several iterations a step, constant or a ramp, chosen on the
              samples that judge, in its favour
  calibrated  what `sample.allocation: calibrated` takes, chosen on other samples
  reached     the fewest blocks at which the calibrated way's sampler, order, spacing, start and mean iterations come as
              near as the paper's best way
"""

import sys
import time
from functools import cache, partial

import torch
from torch import Tensor

from common.command import Parser, count_argument, exit_status_of
from common.errors import UserError
from fpdm import (
    Choices,
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
from fpdm.calibration import Draw, distances, fitting_ways, limit_way
from fpdm.sampling import sample_noise

ITERATIONS = (1, 2, 3, 5, 8)  # a step, of the paper's way
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # of the budget, from the most on
COLUMNS = ("blocks", "paper", "mean", "rms", "calibrated", "mean", "rms", "reached at", "ways", "seconds")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("weights", help="folder with config.json and the weights")
    parser.add_argument("--budgets", type=count_argument, nargs="+", default=[40, 80, 160], help="blocks an image")
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--samples", type=count_argument, default=48, help="that judge; a third as many choose")
    arguments = parser.parse_args()
    if arguments.samples < 3:
        parser.error(f"--samples: {arguments.samples}; 3 at least")
    torch.set_grad_enabled(False)
    model, diffusion = loaded(arguments.weights)
    config = model.config

    def drawing(index: Tensor) -> Draw:
        noise = sample_noise(0, index, (config.in_channels, config.input_size, config.input_size), stream="benchmark")
        labels = index % config.num_classes
        # What was drawn once is not drawn again, the limit above all.
        return cache(partial(sample, model, diffusion, noise, labels, guidance_scale=arguments.guidance_scale))

    judge, draw = map(drawing, torch.arange(arguments.samples * 4 // 3).split(arguments.samples))
    limit = limit_way(diffusion)
    reference = judge(**vars(limit))
    norms = reference.flatten(1).norm(dim=1)

    def errors(way: Way) -> tuple[float, float]:  # the mean first, by which ways are compared
        each = distances(judge, way, reference)  # (B,)
        return float(each.mean()), float((each * norms).norm() / norms.norm())

    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for blocks in arguments.budgets:
        began, outer = time.monotonic(), config.blocks(0)
        budget = blocks if arguments.guidance_scale == 1 else blocks // 2
        constant = min(paper_ways("constant", budget, outer), key=errors)
        ramps = (paper_way(kind, constant.num_steps, budget, outer) for kind in ("more_at_noise", "more_at_data"))
        paper = min(constant, *ramps, key=errors)
        found = calibrate(draw, judge, diffusion, paper, outer_depth=outer, limit=limit)
        reached = blocks
        for share in SHARES:
            way = smaller(diffusion, found.way, round(budget * share), outer)
            if way is None or errors(way)[0] > errors(paper)[0]:
                break
            reached = round(blocks * share)
        numbers = [f"{value:.3f}" for way in (paper, found.way) for value in errors(way)]
        cells = [str(blocks), named(paper), *numbers[:2], named(found.way), *numbers[2:], str(reached)]
        print(f"| {' | '.join(cells)} | {found.tried} | {time.monotonic() - began:.0f} |", flush=True)


def loaded(weights: str) -> tuple[Denoiser, Diffusion]:
    """In float32. Raises UserError where the folder holds none."""
    try:
        return load_pretrained(weights).float().eval(), Diffusion(**read_extra(weights)["objective"])
    except ValueError as error:
        raise UserError(f"WEIGHTS: {error}") from None


def paper_ways(kind: str, budget: int, outer: int) -> list[Way]:
    return [paper_way(kind, max(1, budget // (iterations + outer)), budget, outer) for iterations in ITERATIONS]


def paper_way(kind: str, num_steps: int, budget: int, outer: int) -> Way:
    counts = allocate(kind, num_steps, block_budget=budget, outer_depth=outer)
    settings = SamplerSettings()
    return Way(sampler="ddim", sampler_settings=settings, num_steps=num_steps, iterations=tuple(counts), reuse=True)


def smaller(diffusion: Diffusion, way: Way, budget: int, outer: int) -> Way | None:
    """With the same settings and about as many iterations a step, at fewer blocks; None of DDIM."""
    assert way.iterations is not None
    settings = way.sampler_settings
    choices = Choices(
        iterations=(sum(way.iterations) / way.num_steps,),
        orders=(settings.order,),
        spacings=((settings.spacing, settings.spacing_power),),
        starts=(way.start_extrapolation if way.reuse else None,),
    )
    if way.sampler != "multistep":
        return None
    return next(iter(fitting_ways(diffusion, choices, budget, outer).values()), None)


def named(way: Way) -> str:
    assert way.iterations is not None
    settings, mean = way.sampler_settings, sum(way.iterations) / way.num_steps
    ramp = way.iterations[0] - way.iterations[-1]
    spread = "" if abs(ramp) <= 1 else ", more at noise" if ramp > 0 else ", more at data"
    name = way.sampler if way.sampler == "ddim" else f"order {settings.order}"
    power = f"^{settings.spacing_power:g}" if settings.spacing_power != 1 else ""
    start = f", {way.start_extrapolation:g}" if way.start_extrapolation else "" if way.reuse else ", no reuse"
    return f"{name}, {settings.spacing}{power}, {way.num_steps} x {mean:.2g}{spread}{start}"


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
