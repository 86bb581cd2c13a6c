"""How near to a network's limit its samples come with few blocks: by a fitted sampler, and the paper's way with more.

    python benchmarks/sampling.py runs/demo/weights/000000229376/0.995 [--budgets 40 80 160] [--shares 0.5 0.4 0.3] \
        [--guidance-scale 1] [--samples 128] [--json FILE]

The limit is what the network itself draws from the same noise with many steps and iterations. An error is the distance
of the latents to it, relative to its norm: the mean over the samples, by which ways are compared, and the median. It
says how well the sampler solves the network's equations, not how good the images are.
  paper   DDIM, evenly spaced, reuse: the best of several iterations a step, constant or a ramp, chosen on the samples
          that judge, in its favour
  fitted  what `sample.allocation: calibrated` finds at this share of those blocks, fitted to other samples
  time    of the fitted way, of DDIM's in as many steps and iterations: what the fitted numbers cost
  seconds of the fit, its limit included
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import product
from statistics import median

import torch
from torch import Tensor

from benchmarks.machine import show_machine
from benchmarks.network import take_turns
from common.command import Parser, count_argument, exit_status_of, output_argument
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
COLUMNS = ("blocks", "paper", "mean", "median", "blocks", "fitted", "mean", "median", "time", "seconds")


@dataclass(frozen=True)
class Row:
    """One budget at one share. `time`: of the fitted way, of ddim's with as many steps and iterations."""

    blocks: int
    paper: str
    paper_errors: tuple[float, float]
    fitted_blocks: int
    fitted: str
    fitted_errors: tuple[float, float]
    time: float
    seconds: float  # of the fit

    def __str__(self) -> str:
        one, other = ([f"{error:.3f}" for error in errors] for errors in (self.paper_errors, self.fitted_errors))
        cells = [str(self.blocks), self.paper, *one, str(self.fitted_blocks), self.fitted, *other, f"{self.time:.3f}"]
        return f"| {' | '.join(cells)} | {self.seconds:.0f} |"


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("weights", help="folder with config.json and the weights")
    parser.add_argument("--budgets", type=count_argument, nargs="+", default=[40, 80, 160], help="blocks an image")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.4, 0.3], help="of them, of the fitted one")
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--samples", type=count_argument, default=128, help="that judge; as many are fitted to")
    parser.add_argument("--json", type=output_argument, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.samples < 2:
        parser.error(f"--samples: {arguments.samples}; 2 at least")
    if bad := [share for share in arguments.shares if not 0 < share <= 1]:
        parser.error(f"--shares: {bad[0]:g} is not above 0 and at most 1")
    machine, rows = show_machine(), []
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for row in measured(
        arguments.weights, arguments.budgets, arguments.shares, arguments.guidance_scale, arguments.samples
    ):
        print(row, flush=True)
        rows.append(asdict(row))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


def measured(
    weights: str, budgets: list[int], shares: list[float], guidance_scale: float, samples: int
) -> Iterator[Row]:
    model, diffusion = loaded(weights)
    config, device = model.config, model.pos_embed.device
    outer, halves = config.blocks(0), 1 + (guidance_scale != 1)
    least = config.blocks(1) * halves
    if min(budgets) * min(shares) < least:
        raise UserError(f"--budgets: {min(budgets)} x {min(shares):g} is less than one step of {least} blocks")

    def bind(index: Tensor) -> Draw:
        index = index.to(device)
        noise = sample_noise(0, index, (config.in_channels, config.input_size, config.input_size), stream="benchmark")
        return partial(sample, model, diffusion, noise, index % config.num_classes, guidance_scale=guidance_scale)

    judges = torch.arange(2 * samples, 3 * samples).split(32)

    def drawn(way: Way) -> Tensor:
        return torch.cat([bind(part)(**vars(way)) for part in judges])

    limit = limit_way(diffusion)
    reference = drawn(limit)

    @cache
    def errors(way: Way) -> tuple[float, float]:  # the mean first, by which ways are compared
        each = distances(drawn(way), reference)  # (samples,)
        return float(each.mean()), float(each.median())

    for blocks, share in product(budgets, shares):
        began, budget = time.monotonic(), round(blocks * share) // halves
        start = paper_way("constant", max(1, budget // (outer + 2)), budget, outer)
        found = calibrate(bind, diffusion, start, outer_depth=outer, samples=samples, limit=limit).way
        seconds = time.monotonic() - began
        alike = replace(
            found, sampler="ddim", sampler_settings=SamplerSettings(), start_extrapolation=0.0, relaxation=None
        )
        calls = {name: partial(bind(judges[0]), **vars(way)) for name, way in (("fitted", found), ("ddim", alike))}
        times = {name: median(each) for name, each in take_turns(calls, 5, device.type).items()}
        paper = best_of_paper(blocks // halves, outer, errors)
        ratio = times["fitted"] / times["ddim"]
        yield Row(blocks, named(paper), errors(paper), budget * halves, named(found), errors(found), ratio, seconds)


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
