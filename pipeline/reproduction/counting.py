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
        activations += _one_block(config)
    return Memory(count_parameters(config), activations)


def _one_block(config: DenoiserConfig) -> int:
    """What one block of DiT saves, or one iteration of FPDM."""
    if config.kind == "dit":
        two, one = (_saved(replace(config, depth=depth), 1, recomputed=False) for depth in (2, 1))
    else:
        two, one = (_saved(config, count, recomputed=False) for count in (2, 1))
    return two - one


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


def claims() -> Iterator[str]:
    """Lines of Markdown: the paper's two claims of size at XL/2, with verdicts."""
    dit, fpdm = DenoiserConfig(kind="dit"), DenoiserConfig(kind="fpdm")
    counts = [count_parameters(config) for config in (dit, fpdm)]
    fewer = 1 - counts[1] / counts[0]
    yield f"**87 % fewer parameters: {'holds' if round(100 * fewer) == 87 else 'does not hold'}.** XL/2, 1,000 classes:"
    yield f"FPDM {counts[1]:,}, DiT {counts[0]:,}, {100 * fewer:.1f} % fewer (counted exactly)."
    yield ""
    yield "| GB of training XL/2, batch 64 | DiT | FPDM, m = 6 | FPDM, m = 12 | less at m = 12 |"
    yield "|---|---|---|---|---|"
    saved = []
    for recomputed, name in ((False, "nothing recomputed"), (True, "blocks and iterations recomputed")):
        asked = ((dit, 1), (fpdm, 6), (fpdm, 12))
        sizes = [training_memory(config, count, recomputed=recomputed).gigabytes for config, count in asked]
        saved.append(1 - sizes[2] / sizes[0])
        yield f"| {name} | {' | '.join(f'{size:.1f}' for size in sizes)} | {saved[-1]:.0%} |"
    published = 1 - PUBLISHED_GB["fpdm"] / PUBLISHED_GB["dit"]
    yield f"| published | {PUBLISHED_GB['dit']} | | {PUBLISHED_GB['fpdm']} | {published:.0%} |"
    yield ""
    yield f"**60 % less training memory: {_memory_verdict(saved)}.** Counted: what the backward pass needs of the"
    yield f"forward one in bfloat16, and {BYTES_A_PARAMETER} bytes a parameter (fp32 weights, Adam's moments, average;"
    yield "16-bit weights and gradients). Not counted: the framework, fragments, buffers. m: iterations with"
    yield "gradient, at most M. The paper says neither what it recomputes nor in which precision."


def _memory_verdict(saved: list[float]) -> str:
    """`saved`: without and with recomputation."""
    held = ["holds" if share >= 0.595 else f"does not hold ({share:.0%})" for share in saved]
    return f"{held[0]} where nothing is recomputed, {held[1]} where everything is"
