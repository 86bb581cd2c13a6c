"""Compare this implementation with vectors of the published network, and of this project's options of it.

    python tests/golden/compare.py tests/golden/*.safetensors tests/golden/options/*.safetensors

Rebuilds the network from each file's metadata, runs every entry, and prints the largest difference of each relative to
the largest magnitude expected, beside its bound: how far another machine's float32 rounding may move it, derived on the
way from the network itself (`rounding.py` says how). `t` marks what the timesteps' frequencies decide: exp rounds them
differently from machine to machine, t up to 999 multiplies that by as much, and cos and sin of the angles pass it on;
without it the bound would be less than half. Exit status 1 if a difference is above its bound, or if an entry is not
understood; 2 if a file cannot be used. Not covered by the files: the loss at t = 0.

Layout of a file, a safetensors in float32; only what its entries need has to be there:
  metadata           hidden_size, num_heads, input_size, patch_size, in_channels, num_classes, mlp_ratio, learn_sigma;
                     DiT: depth; FPDM: depth "", pre_depth, post_depth, pre_post_timestep_conditioning;
                     options of `DenoiserConfig` that are not the published network's
  param.NAME         the parameters by their published names, without the position table
  in.x in.t in.y     inputs; the label num_classes is the null label
  out.eval[.kK]      output after K iterations from the input
  out.cfg4.first3    both halves under guidance 4 of the first three channels: x[:2] twice, t = 500,
                     labels 1, 2, null, null
  out.reuse.*, solution.second   two calls of 3 iterations, the second, of 0.9 x at t = 650, from the first's solution
  loss.*, grad.NAME  of the squared error to in.grad_target; FPDM: n = 3, m = 2
  eps.*, v_zsnr.*    a process: noise, t, y and the loss's terms; respaced_timesteps; z and ddimS, ddpmS, ddimS.reuse
                     with S steps; ddpmS.step_noise
"""

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rounding import bounds
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fpdm import Denoiser, DenoiserConfig, Diffusion, assemble, guide, sample, spaced_timesteps

ITERATIONS = 4  # of every call whose entry states no other number
INPUTS = ("param.", "in.")
PROCESS_INPUTS = ("noise", "t", "y", "z")
OPTIONS = {
    **dict.fromkeys(("norm", "mlp", "injection"), str),
    **dict.fromkeys(("qk_norm", "rope", "value_residual"), "True".__eq__),
}
PROCESSES = {
    "eps": Diffusion(prediction="epsilon"),
    "v_zsnr": Diffusion(prediction="v", zero_terminal_snr=True, loss_weight="p2"),
}


def read(path: Path) -> tuple[Denoiser, dict[str, Tensor]]:
    """The network of a file and its entries. ValueError or KeyError where the file does not describe one."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        entries = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    whole = ("hidden_size", "num_heads", "input_size", "patch_size", "in_channels", "num_classes")
    options: dict = {name: int(metadata[name]) for name in whole}
    options |= {"mlp_ratio": float(metadata["mlp_ratio"]), "learned_variance": metadata["learn_sigma"] == "True"}
    if metadata["depth"]:
        options |= {"kind": "dit", "depth": int(metadata["depth"])}
    else:
        options |= {name: int(metadata[name]) for name in ("pre_depth", "post_depth")}
        options["pre_post_timestep_conditioning"] = metadata["pre_post_timestep_conditioning"] == "True"
    options |= {name: read(metadata[name]) for name, read in OPTIONS.items() if name in metadata}
    parameters = {name.removeprefix("param."): tensor for name, tensor in entries.items() if name.startswith("param.")}
    return assemble(parameters, DenoiserConfig(**options)), entries


def results(model: Denoiser, entries: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """What we compute for every entry of a file that is not an input."""
    yield from outputs(model, entries)
    if any(name.startswith(("loss.", "grad.")) for name in entries):
        yield from gradients(model, entries)
    for name, diffusion in PROCESSES.items():
        if any(entry.startswith(f"{name}.") for entry in entries):
            yield from process(model, entries, name, diffusion)


@torch.no_grad()
def outputs(model: Denoiser, entries: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    x, t, y = (entries[f"in.{name}"] for name in ("x", "t", "y"))
    for name in (name for name in entries if name.startswith("out.eval")):
        count = int(name.rpartition(".k")[2]) if ".k" in name else None
        yield name, model(x, t, y, iterations=count).output
    if "out.cfg4.first3" in entries:
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
    x0, y = entries["in.x"], entries[f"{name}.y"]
    if any(f"{name}.{term}" in entries for term in ("mse", "vb", "loss")):
        noise, t = entries[f"{name}.noise"], entries[f"{name}.t"]
        output = model(diffusion.add_noise(x0, noise, t), t, y, iterations=ITERATIONS).output
        for term, value in diffusion.loss(output, x0, noise, t).items():
            yield f"{name}.{term}", value
    if (entry := f"{name}.respaced_timesteps") in entries:
        yield entry, torch.tensor(spaced_timesteps(diffusion.num_timesteps, len(entries[entry])))
    for entry in entries:
        if match := re.fullmatch(rf"{name}\.(ddim|ddpm)(\d+)(\.reuse|\.again)?", entry):
            sampler, steps = match[1], int(match[2])
            step_noise = entries[f"{entry}.step_noise"].__getitem__ if sampler == "ddpm" else None
            yield (
                entry,
                sample(
                    model,
                    diffusion,
                    entries[f"{name}.z"],
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


@dataclass(frozen=True)
class Row:
    """One entry of a file. An entry that nothing computes differs by infinity, and its bound is 0."""

    name: str
    difference: float
    bound: float
    by_timestep: bool = False  # whether most of the bound comes of the timesteps' frequencies

    @property
    def met(self) -> bool:
        return self.difference <= self.bound

    def __str__(self) -> str:
        mark = "t" if self.by_timestep else " "
        return (
            f"  {self.difference:9.2e}  {self.bound:9.2e} {mark} {self.name}{'' if self.met else '  ABOVE ITS BOUND'}"
        )


def compare(path: Path, *, explain: bool = False) -> list[Row]:
    """Every entry's difference and bound; `explain` also finds `by_timestep`, for half as much time again."""
    model, entries = read(path)
    inputs = {f"{name}.{part}" for name in PROCESSES for part in PROCESS_INPUTS}
    wanted = {
        name
        for name in entries
        if not name.startswith(INPUTS) and name not in inputs and not name.endswith(".step_noise")
    }
    found = dict(results(model, entries))
    compute = partial(results, model, entries)
    allowed = bounds(compute, relative_difference)
    others = bounds(compute, relative_difference, exact=["exp"]) if explain else allowed
    return [
        Row(name, relative_difference(found[name], entries[name]), allowed[name], others[name] < allowed[name] / 2)
        if name in found
        else Row(name, float("inf"), 0.0)
        for name in sorted(wanted)
    ]


def main(command_line: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    arguments = parser.parse_args(command_line)
    failed = 0
    for path in arguments.files:
        print(f"{path}\n  differs by      bound   entry")
        try:
            rows = compare(path, explain=True)
        except KeyError as missing:
            return unusable(path, f"{missing} is missing from its metadata or its entries")
        except (OSError, SafetensorError, ValueError) as error:
            return unusable(path, str(error))
        if not rows:
            return unusable(path, "it has no entry to compare with")
        for row in rows:
            failed += not row.met
            print(row)
    print(f"{failed} entries above their bounds" if failed else "all entries within their bounds")
    return 1 if failed else 0


def unusable(path: Path, reason: str) -> int:
    print(f"error: {path}: {reason}; compare.py --help shows the layout", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
