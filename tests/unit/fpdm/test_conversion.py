"""A converted DiT keeps its outer blocks, and its iteration begins as one of its inner blocks."""

from dataclasses import replace

import pytest
import torch

from fpdm.config import DenoiserConfig
from fpdm.conversion import fpdm_from_dit
from fpdm.denoiser import Denoiser
from fpdm.weights import assemble
from tests.unit.fpdm.test_denoiser import SMALL, inputs, scrambled

OPTIONS = [{}, {"qk_norm": True, "rope": True, "value_residual": True, "mlp": "swiglu"}]


def dit(depth: int, **settings) -> Denoiser:
    return scrambled(DenoiserConfig(kind="dit", depth=depth, **SMALL, **settings))


def chosen_blocks(model: Denoiser, numbers: list[int]) -> Denoiser:
    """The DiT of these blocks of `model`, in this order."""
    given = model.state_dict()
    tensors = {name: tensor for name, tensor in given.items() if not name.startswith("blocks.")}
    for place, number in enumerate(numbers):
        start = f"blocks.{number}."
        tensors |= {name.replace(start, f"blocks.{place}."): given[name] for name in given if name.startswith(start)}
    return assemble(tensors, replace(model.config, depth=len(numbers)))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("injection", ["concat", "decay"])
@torch.no_grad()
def test_one_iteration_is_the_block_itself(injection, options) -> None:
    model = dit(6, **options)
    converted = fpdm_from_dit(model, pre_depth=2, post_depth=2, injection=injection, block=3)
    arguments = inputs(3, model.config)
    expected = chosen_blocks(model, [0, 1, 3, 4, 5])(*arguments).output
    assert torch.allclose(converted(*arguments, iterations=1).output, expected, rtol=1e-4, atol=1e-5)
    default = fpdm_from_dit(model, injection=injection)(*arguments, iterations=1).output
    assert torch.allclose(default, chosen_blocks(model, [0, 2, 5])(*arguments).output, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_both_injections_are_the_same_map() -> None:
    model = dit(5)
    arguments = inputs(3, model.config)
    first, second = (
        fpdm_from_dit(model, injection=injection)(*arguments, iterations=4).output for injection in ("concat", "decay")
    )
    assert torch.allclose(first, second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("depth", "settings", "message"),
    [
        (2, {}, "pre_depth: 1 and post_depth 1 leave none of the 2 blocks to iterate"),
        (5, {"block": 0}, "block: 0 is not one of the inner blocks, 1 to 3"),
        (5, {"block": 4}, "block: 4 is not one of the inner blocks, 1 to 3"),
        (5, {"post_depth": -1}, "post_depth: -1 is negative"),
    ],
)
def test_what_leaves_no_block_is_refused(depth, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        fpdm_from_dit(dit(depth), **settings)


def test_only_a_dit_with_one_embedder_is_converted() -> None:
    with pytest.raises(ValueError, match="kind: the network is of kind fpdm"):
        fpdm_from_dit(scrambled(DenoiserConfig(**SMALL)))
    with pytest.raises(ValueError, match="self_conditioned: each block embeds timestep and label by itself"):
        fpdm_from_dit(dit(3, self_conditioned=True))
