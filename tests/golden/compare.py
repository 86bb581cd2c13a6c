"""Compare this implementation with vectors of the published network.

    python tests/golden/compare.py tests/golden/*.safetensors [--tolerance 1e-5]

Rebuilds the network from each file's metadata, runs every entry, and prints the largest difference of each, relative
to the largest magnitude expected. Exit status 1 if one is above the tolerance, or if an entry is not understood.
Not covered by the files: the loss at t = 0.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from fpdm import Denoiser, DenoiserConfig, Diffusion, assemble, guide, sample, spaced_timesteps

ITERATIONS = 4  # of every call whose entry states no other number
INPUTS = ("param.", "in.")
PROCESS_INPUTS = ("noise", "t", "y", "z")
PROCESSES = {
    "eps": Diffusion(prediction="epsilon"),
    "v_zsnr": Diffusion(prediction="v", zero_terminal_snr=True, loss_weight="p2"),
}


def read(path: Path) -> tuple[Denoiser, dict[str, Tensor]]:
    """The network of a file and its entries."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        entries = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    whole = ("hidden_size", "num_heads", "input_size", "patch_size", "in_channels", "num_classes")
    options: dict = {name: int(metadata[name]) for name in whole}
    options |= {"mlp_ratio": float(metadata["mlp_ratio"]), "learned_variance": metadata["learn_sigma"] == "True"}
    if metadata["depth"]:
        options |= {"kind": "dit", "depth": int(metadata["depth"])}
    else:
        options |= {name: int(metadata[name]) for name in ("pre_depth", "post_depth")}
        options["pre_post_timestep_conditioning"] = metadata["pre_post_timestep_conditioning"] == "True"
    parameters = {name.removeprefix("param."): tensor for name, tensor in entries.items() if name.startswith("param.")}
    return assemble(parameters, DenoiserConfig(**options)), entries


def results(model: Denoiser, entries: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """What we compute for every entry of a file that is not an input."""
    yield from outputs(model, entries)
    yield from gradients(model, entries)
    for name, diffusion in PROCESSES.items():
        yield from process(model, entries, name, diffusion)


@torch.no_grad()
def outputs(model: Denoiser, entries: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    x, t, y = (entries[f"in.{name}"] for name in ("x", "t", "y"))
    for name in (name for name in entries if name.startswith("out.eval")):
        count = int(name.rpartition(".k")[2]) if ".k" in name else None
        yield name, model(x, t, y, iterations=count).output
    yield "out.cfg4.first3", guided_both(model, x[:2])
    if "solution.second" in entries:
        first = model(x, torch.full_like(t, 700), y, iterations=3)
        second = model(0.9 * x, torch.full_like(t, 650), y, iterations=3, start=first.solution)
        yield "out.reuse.first.t700.k3", first.output
        yield "out.reuse.second.t650.k3.x0.9", second.output
        yield "solution.second", second.solution


def guided_both(model: Denoiser, x: Tensor) -> Tensor:
    """The published guidance returns both halves, each with its own unguided channels."""
    null = model.config.num_classes
    y = torch.tensor([1, 2, null, null])
    output = model(torch.cat([x, x]), torch.full((4,), 500), y, iterations=ITERATIONS).output
    conditional, unconditional = output.chunk(2)
    guided = guide(conditional, unconditional, 4.0, 3)
    return torch.cat([guided, torch.cat([guided[:, :3], unconditional[:, 3:]], dim=1)])


def gradients(model: Denoiser, entries: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    x, t, y = (entries[f"in.{name}"] for name in ("x", "t", "y"))
    output = model(x, t, y, iterations=(3, 2)).output
    loss = (output - entries["in.grad_target"]).square().mean()
    yield ("loss.mse" if model.config.kind == "dit" else "loss.sjfb_n3_m2"), loss[None]
    parameters = dict(model.named_parameters())
    for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
        yield f"grad.{name}", gradient


@torch.no_grad()
def process(
    model: Denoiser, entries: dict[str, Tensor], name: str, diffusion: Diffusion
) -> Iterator[tuple[str, Tensor]]:
    """The terms of the loss, the spaced timesteps and the samples of one forward process."""
    given = {part: entries[f"{name}.{part}"] for part in PROCESS_INPUTS}
    x0, noise, t, y = entries["in.x"], given["noise"], given["t"], given["y"]
    output = model(diffusion.add_noise(x0, noise, t), t, y, iterations=ITERATIONS).output
    for term, value in diffusion.loss(output, x0, noise, t).items():
        yield f"{name}.{term}", value
    num_steps = len(entries[f"{name}.respaced_timesteps"])
    yield f"{name}.respaced_timesteps", torch.tensor(spaced_timesteps(diffusion.num_timesteps, num_steps))
    for entry in entries:
        if match := re.fullmatch(rf"{name}\.(ddim|ddpm)(\d+)(\.reuse|\.again)?", entry):
            sampler, steps = match[1], int(match[2])
            step_noise = entries[f"{entry}.step_noise"].__getitem__ if sampler == "ddpm" else None
            yield (
                entry,
                sample(
                    model,
                    diffusion,
                    given["z"],
                    y,
                    sampler=sampler,
                    num_steps=steps,
                    iterations=[ITERATIONS] * steps,
                    reuse=match[3] == ".reuse",
                    step_noise=step_noise,
                ),
            )


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest magnitude expected; infinite if the shapes differ or a number is missing."""
    if found.shape != expected.shape or not found.isfinite().all():
        return float("inf")
    scale = expected.double().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((found.detach().double() - expected.double()).abs().max() / scale)


def compare(path: Path) -> dict[str, float]:
    """Largest relative difference of every entry; infinite for an entry that nothing computes."""
    model, entries = read(path)
    inputs = {f"{name}.{part}" for name in PROCESSES for part in PROCESS_INPUTS}
    wanted = {
        name
        for name in entries
        if not name.startswith(INPUTS) and name not in inputs and not name.endswith(".step_noise")
    }
    found = dict(results(model, entries))
    return {
        name: relative_difference(found[name], entries[name]) if name in found else float("inf")
        for name in sorted(wanted)
    }


def main(command_line: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest relative difference allowed (1e-5)")
    arguments = parser.parse_args(command_line)
    failed = 0
    for path in arguments.files:
        print(path)
        for name, difference in compare(path).items():
            above = not difference <= arguments.tolerance
            failed += above
            print(f"  {difference:9.2e}  {name}{'  ABOVE TOLERANCE' if above else ''}")
    print(
        f"{failed} entries above {arguments.tolerance:g}" if failed else f"all entries within {arguments.tolerance:g}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
