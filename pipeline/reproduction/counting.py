"""Parameters and training memory of the published networks, counted without a run: on torch's meta device."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.autograd.graph import saved_tensors_hooks

from fpdm.config import DenoiserConfig
from fpdm.denoiser import Denoiser, count_parameters

BATCH = 64  # the paper's 512 on 8 GPUs
# fp32 weights and Adam's two moments, their average, and weights and gradients in 16 bits
BYTES_A_PARAMETER = 4 * 3 + 4 + 2 * 2
PUBLISHED_GB = {"dit": 25.2, "fpdm": 10.2}


@dataclass(frozen=True)
class Memory:
    """What training keeps at once, in bytes; `activations`: what the backward pass needs of the forward one."""

    parameters: int
    activations: int

    @property
    def gigabytes(self) -> float:
        return (self.parameters * BYTES_A_PARAMETER + self.activations) / 1e9


def training_memory(config: DenoiserConfig, grad_iterations: int, *, recomputed: bool) -> Memory:
    """Of a batch of 64 in bfloat16, with so many iterations that have a gradient.

    recomputed: by activation checkpointing, which keeps the inputs of blocks and iterations, and all of one at a time.
    """
    activations = _saved(config, grad_iterations, recomputed=recomputed)
    if recomputed:
        activations += max(_one_block(config))
    return Memory(count_parameters(config), activations)


def _one_block(config: DenoiserConfig) -> Iterator[int]:
    """What one block saves, and one iteration."""
    if config.kind == "dit":
        two, one = (_saved(replace(config, depth=depth), 1, recomputed=False) for depth in (2, 1))
    else:
        two, one = (_saved(config, count, recomputed=False) for count in (2, 1))
    yield two - one


def _saved(config: DenoiserConfig, grad_iterations: int, *, recomputed: bool) -> int:
    """Bytes that a forward pass saves for the backward one, each storage once, without the parameters."""
    with torch.device("meta"):
        model = Denoiser(config).to(torch.bfloat16)
        shape = (BATCH, config.in_channels, config.input_size, config.input_size)
        latents, zero = torch.empty(shape, dtype=torch.bfloat16), torch.zeros(BATCH, dtype=torch.long)
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(latents, zero, zero, iterations=(0, grad_iterations), activation_checkpointing=recomputed)
    return sum(storage.nbytes() for storage in saved.values())


def claims() -> list[str]:
    """Lines of Markdown: the paper's two claims of size at XL/2, with verdicts."""
    networks = {kind: DenoiserConfig(kind=kind) for kind in ("dit", "fpdm")}  # type: ignore[arg-type]
    counts = {kind: count_parameters(config) for kind, config in networks.items()}
    fewer = 1 - counts["fpdm"] / counts["dit"]
    lines = [
        f"**87 % fewer parameters: {'holds' if round(100 * fewer) == 87 else 'does not hold'}.** XL/2 with 1,000 classes: "
        f"FPDM {counts['fpdm']:,}, DiT {counts['dit']:,}, {100 * fewer:.1f} % fewer (counted exactly).",
        "",
        "| GB of training XL/2, batch 64 | DiT | FPDM, m = 6 | FPDM, m = 12 | less at m = 12 |",
        "|---|---|---|---|---|",
    ]
    saved = []
    for recomputed, name in ((False, "nothing recomputed"), (True, "blocks and iterations recomputed")):
        dit, six, twelve = (
            training_memory(networks[kind], count, recomputed=recomputed).gigabytes
            for kind, count in (("dit", 1), ("fpdm", 6), ("fpdm", 12))
        )
        saved.append(1 - twelve / dit)
        lines.append(f"| {name} | {dit:.1f} | {six:.1f} | {twelve:.1f} | {saved[-1]:.0%} |")
    published = 1 - PUBLISHED_GB["fpdm"] / PUBLISHED_GB["dit"]
    lines += [
        f"| published | {PUBLISHED_GB['dit']} | | {PUBLISHED_GB['fpdm']} | {published:.0%} |",
        "",
        f"**60 % less training memory: {_memory_verdict(saved)}.** Counted: what the backward pass needs of the forward one "
        f"in bfloat16, and {BYTES_A_PARAMETER} bytes a parameter (fp32 weights, Adam's moments and average; 16-bit weights "
        "and gradients). Not counted: the framework, fragments, buffers. m: iterations with gradient, at most M. The paper "
        "says neither what it recomputes nor in which precision.",
    ]
    return lines


def _memory_verdict(saved: list[float]) -> str:
    """`saved`: without and with recomputation."""
    held = ["holds" if share >= 0.595 else f"does not hold ({share:.0%})" for share in saved]
    return f"{held[0]} where nothing is recomputed, {held[1]} where everything is"
