"""The paper's two claims of size: parameters and training memory of the published networks, counted without a run."""

from collections.abc import Iterator

from fpdm.config import DenoiserConfig
from fpdm.denoiser import count_parameters
from pipeline.planning.memory import Activations

BATCH = 64  # the paper's 512 on 8 GPUs
# fp32 weights and Adam's two moments, their average, and weights and gradients in 16 bits
BYTES_A_PARAMETER = 4 * 3 + 4 + 2 * 2
PUBLISHED_GB = {"dit": 25.2, "fpdm": 10.2}


def training_gigabytes(config: DenoiserConfig, grad_iterations: int, *, recomputed: bool) -> float:
    """Of a batch of 64 in bfloat16 on one GPU, with so many iterations that have a gradient."""
    # As attention was computed then, with its scores.
    activations = Activations(config, BATCH, grad_iterations, recomputed, fused_attention=False)
    return (count_parameters(config) * BYTES_A_PARAMETER + activations.bytes) / 1e9


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
        sizes = [training_gigabytes(config, count, recomputed=recomputed) for config, count in asked]
        saved.append(1 - sizes[2] / sizes[0])
        yield f"| {name} | {' | '.join(f'{size:.1f}' for size in sizes)} | {saved[-1]:.0%} |"
    published = 1 - PUBLISHED_GB["fpdm"] / PUBLISHED_GB["dit"]
    yield f"| published | {PUBLISHED_GB['dit']} | | {PUBLISHED_GB['fpdm']} | {published:.0%} |"
    yield ""
    yield f"**60 % less training memory: {_memory_verdict(saved)}.** Counted: what the backward pass needs of the"
    yield f"forward one in bfloat16, and {BYTES_A_PARAMETER} bytes a parameter (fp32 weights, Adam's moments, average;"
    yield "16-bit weights and gradients). Not counted: the framework, fragments, buffers. m: iterations with"
    yield "gradient, at most M. The paper says neither what it recomputes nor in which precision. Attention keeps its"
    yield "scores here, as it was computed then; with fused attention a step takes less (docs/gpu.md)."


def _memory_verdict(saved: list[float]) -> str:
    """`saved`: without and with recomputation."""
    held = ["holds" if share >= 0.595 else f"does not hold ({share:.0%})" for share in saved]
    return f"{held[0]} where nothing is recomputed, {held[1]} where everything is"
