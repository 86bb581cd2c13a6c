"""A trained DiT as the start of an FPDM: its outer blocks are kept, and one of the blocks between becomes the implicit.

The converted iteration is x -> Block(a x + (1 - a) h) with h the tokens after the pre-layers, where it begins: so the
first iteration is the block itself. Both kinds of injection hold this map exactly. One block does not do what all the
inner ones did: training has to make up for the rest. Their mean starts worse than any of them (docs/training.md).
"""

from dataclasses import replace

import torch
from torch import Tensor

from fpdm.config import DenoiserConfig, Injection
from fpdm.denoiser import Denoiser
from fpdm.weights import assemble

KEEP = 0.5  # a: the part of the iterate that an iteration keeps; networks that start anew have it too ("decay")


def fpdm_from_dit(
    dit: Denoiser,
    *,
    pre_depth: int = 1,
    post_depth: int = 1,
    injection: Injection = "concat",
    block: int | None = None,
) -> Denoiser:
    """The FPDM, on the DiT's device and in its dtype; its explicit blocks know the timestep, as the DiT's do.

    Args:
        dit: not changed; the tensors of embeddings, outer blocks and last layer are shared with it.
        pre_depth, post_depth: how many of its first and last blocks are kept.
        injection: see `DenoiserConfig`.
        block: the number, from 0, of the inner block that becomes the implicit one; None: the one at a quarter.

    Raises:
        ValueError: naming the argument that does not fit, or why a network cannot be converted.
    """
    config = dit.config
    if config.kind != "dit":
        raise ValueError(f"kind: the network is of kind {config.kind}; a DiT is converted")
    if config.self_conditioned:
        raise ValueError(
            "self_conditioned: each block embeds timestep and label by itself, which no FPDM does; convert a DiT whose "
            "blocks share one embedder, as those of the paper's code do"
        )
    for name, depth in (("pre_depth", pre_depth), ("post_depth", post_depth)):
        if depth < 0:
            raise ValueError(f"{name}: {depth} is negative; choose 0 or more")
    inner = range(pre_depth, config.depth - post_depth)
    if not inner:
        raise ValueError(
            f"pre_depth: {pre_depth} and post_depth {post_depth} leave none of the {config.depth} blocks to iterate"
        )
    chosen = inner[len(inner) // 4] if block is None else block
    if chosen not in inner:
        raise ValueError(f"block: {chosen} is not one of the inner blocks, {inner.start} to {inner.stop - 1}")

    stacks = {f"blocks.{number}.": f"blocks_pre.{number}." for number in range(pre_depth)}
    stacks |= {f"blocks.{inner.stop + number}.": f"blocks_post.{number}." for number in range(post_depth)}
    given = dit.state_dict()
    tensors = {name: tensor for name, tensor in given.items() if not name.startswith("blocks.")}
    for before, after in (stacks | {f"blocks.{chosen}.": "block_fixed_point."}).items():
        tensors |= {after + name.removeprefix(before): given[name] for name in given if name.startswith(before)}
    tensors |= _injection(injection, given["pos_embed"].new_zeros(config.hidden_size))
    fpdm = replace(
        config,
        kind="fpdm",
        depth=DenoiserConfig.depth,
        pre_depth=pre_depth,
        post_depth=post_depth,
        pre_post_timestep_conditioning=True,
        injection=injection,
    )
    return assemble(tensors, fpdm)


def _injection(kind: Injection, zero: Tensor) -> dict[str, Tensor]:
    """Parameters with which an iteration's input is exactly KEEP x + (1 - KEEP) h; zero: (D,) of that."""
    one = torch.diag(zero + 1)
    tensors = {"block_pre_projection.weight": (1 - KEEP) * one, "block_pre_projection.bias": zero}
    if kind == "decay":
        return tensors | {"block_fixed_point_decay": (zero + KEEP).logit()}
    both = torch.cat([KEEP * one, one], dim=1)  # of [x, (1 - KEEP) h]
    return tensors | {  # GELU(u) - GELU(-u) = u, also of its tanh approximation
        "block_fixed_point_projection_fc1.weight": torch.cat([both, -both]),
        "block_fixed_point_projection_fc1.bias": torch.cat([zero, zero]),
        "block_fixed_point_projection_fc2.weight": torch.cat([one, -one], dim=1),
        "block_fixed_point_projection_fc2.bias": zero.clone(),
    }
