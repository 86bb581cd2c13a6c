"""Whether a network's iteration is one that comes to rest: its residual by timestep and iteration.

    python benchmarks/residuals.py WEIGHTS [WEIGHTS ...] [--steps 50] [--iterations 64] [--samples 16] [--json FILE]

The residual is ||f(x) - x|| / ||f(x)||, mean over samples that DDIM draws in so many evenly spaced steps without reuse
or guidance, so that every step's iteration begins at its input. A step rises where its residual is larger than after
some iteration before, by more than what float32 leaves of it: from FLOOR down a residual is rounding.
"""

import json
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.machine import show_machine
from benchmarks.sampling import loaded
from common.command import Parser, count_argument, exit_status_of
from fpdm import SamplerSettings, Way, build_sampler, measure_residuals, sample
from fpdm.sampling import sample_noise

FLOOR = 1e-5  # a hundred of float32's relative steps
SHOWN = (1, 2, 4, 8, 16, 32, 64)  # iterations with a column


@dataclass(frozen=True)
class Step:
    """One timestep: residuals by iteration."""

    timestep: float
    residuals: list[float]

    @property
    def rise(self) -> float:
        """1 where the residual never rises, 1.1 where some iteration's is a tenth above the least before it."""
        least, most = self.residuals[0], 1.0
        for residual in self.residuals[1:]:
            if residual > FLOOR:
                most = max(most, residual / max(least, FLOOR))
            least = min(least, residual)
        return most


@torch.no_grad()
def steps_of(weights: str, num_steps: int, iterations: int, samples: int) -> list[Step]:
    model, diffusion = loaded(weights)
    config, device = model.config, model.pos_embed.device
    index = torch.arange(samples)
    noise = sample_noise(0, index, (config.in_channels, config.input_size, config.input_size), stream="benchmark")
    draw = partial(sample, model, diffusion, noise.to(device), (index % config.num_classes).to(device))
    counts = (iterations,) * num_steps
    settings = SamplerSettings()
    way = Way(sampler="ddim", sampler_settings=settings, num_steps=num_steps, iterations=counts, reuse=False)
    timesteps = build_sampler(diffusion, "ddim", num_steps, settings).timesteps
    curves = [curve.tolist() for curve in measure_residuals(draw, way)]
    return [Step(float(time), curve) for time, curve in zip(timesteps, curves, strict=True)]


def table(steps: list[Step]) -> str:
    """A row a timestep, from noise to data."""
    shown = [count for count in SHOWN if count <= len(steps[0].residuals)]
    lines = [["timestep", *(f"{count} it." for count in shown), "rises by"], ["---"] * (len(shown) + 2)]
    for step in steps:
        risen = f"{100 * (step.rise - 1):.1f} %" if step.rise > 1 else "-"
        lines.append([f"{step.timestep:g}", *(f"{step.residuals[count - 1]:.1e}" for count in shown), risen])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def summary(steps: list[Step]) -> str:
    rising = [step for step in steps if step.rise > 1]
    last = max(step.residuals[-1] for step in steps)
    most = max(step.rise for step in steps)
    risen = f"rises at {len(rising)}, by {100 * (most - 1):.1f} % at most" if rising else "rises at none"
    count = len(steps[0].residuals)
    return f"{len(steps)} timesteps: at most {last:.1e} after {count} iterations; {risen}"


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("weights", nargs="+", help="folder with config.json and the weights")
    parser.add_argument("--steps", type=count_argument, default=50)
    parser.add_argument("--iterations", type=count_argument, default=64)
    parser.add_argument("--samples", type=count_argument, default=16)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    machine, found = show_machine(), {}
    for weights in arguments.weights:
        found[weights] = steps_of(weights, arguments.steps, arguments.iterations, arguments.samples)
        print(f"\n{weights}\n\n{table(found[weights])}\n\n{summary(found[weights])}", flush=True)
    if arguments.json:
        rows = {weights: [asdict(step) for step in steps] for weights, steps in found.items()}
        arguments.json.write_text(json.dumps({"machine": machine, "weights": rows}, indent=1))


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
