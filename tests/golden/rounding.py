"""How far two right implementations of one network may lie apart in float32.

No two machines round alike: their vector units sum in another order, and their exp, cos and sin differ in the last
place. `Rounding` plays another machine. IEEE 754 fixes sums, products and quotients of two numbers, and they are left
alone; every other float32 operation's result is moved, up or down at random, by

  one unit in the last place, what SLEEF, MKL and the C library promise of their elementary functions; and
  sqrt(K) half units of |A| |B| for a product or sum over K terms, in whatever order (Higham and Mary, "A new approach
  to probabilistic rounding error analysis", SIAM J. Sci. Comput. 41, 2019, theorem 2.4).

What an entry moves by then is what rounding alone can do to it, through all that follows. `bounds` takes the largest of
DRAWS, twice: both implementations round. Nothing in it comes from a difference that was measured between machines.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from random import Random
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

HALF_UNIT = 2.0**-24  # of the last place, relative to the number
DRAWS = 2
BOTH = 2  # implementations round, each as much
PRODUCTS = ("mm", "addmm", "bmm", "convolution")
SUMS = ("sum", "mean")
# IEEE 754 fixes their results, or they are numbers that were there before.
EXACT = """
    add sub rsub mul div sqrt reciprocal abs neg maximum minimum amax amin clamp clamp_min
    alias cat clone copy _to_copy detach expand flip permute repeat _unsafe_view stack where
    embedding gather index index_put masked_fill select select_backward slice slice_backward
    arange empty empty_like fill full full_like lift_fresh new_empty new_full new_ones new_zeros
    ones_like zero zeros zeros_like
"""
SIGNS = 2**20  # drawn once; more numbers than any result of the files has

Results = Iterable[tuple[str, Tensor]]


class Rounding(TorchDispatchMode):
    """Another machine's rounding, a function of `seed`; operations named in `exact` are left as they are."""

    def __init__(self, seed: int, exact: Iterable[str] = ()) -> None:
        super().__init__()
        self.exact = {*EXACT.split(), *exact}
        self.signs = 1 - 2 * torch.randint(0, 2, (SIGNS,), generator=torch.Generator().manual_seed(seed)).float()
        self.places = Random(seed)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__.rstrip("_")  # in place or not
        if function.is_view or name in self.exact:
            return results
        for result in results if isinstance(results, tuple | list) else (results,):
            if isinstance(result, Tensor) and result.dtype == torch.float32:
                amount = 2 * HALF_UNIT * result.abs()
                if name in PRODUCTS or name in SUMS:
                    magnitudes = tree_map_only(Tensor, _magnitude, args)
                    amount += (
                        math.sqrt(_terms(name, args, result)) * HALF_UNIT * function(*magnitudes, **(kwargs or {}))
                    )
                place = self.places.randrange(SIGNS - result.numel())
                result.addcmul_(amount, self.signs[place : place + result.numel()].view(result.shape))
        return results


def _magnitude(tensor: Tensor) -> Tensor:
    return tensor.abs() if tensor.is_floating_point() else tensor


def _terms(name: str, args: tuple, result: Tensor) -> int:
    """How many numbers are summed up for one of the result."""
    operands = [value for value in args if isinstance(value, Tensor)]
    if name in SUMS:
        return operands[0].numel() // max(1, result.numel())
    return operands[1][0].numel() if name == "convolution" else operands[-1].shape[-2]


@contextmanager
def in_plain_operations() -> Iterator[None]:
    """The network by operations that `Rounding` knows: neither oneDNN's nor fused attention."""
    with patch("fpdm.linear.suits_onednn", return_value=False), sdpa_kernel(SDPBackend.MATH):
        yield


def bounds(
    compute: Callable[[], Results], distance: Callable[[Tensor, Tensor], float], exact: Iterable[str] = ()
) -> dict[str, float]:
    """How large `distance` may be between two machines' results of `compute`, by the results' names."""
    with in_plain_operations():
        here = {name: result.detach() for name, result in compute()}
        largest = dict.fromkeys(here, 0.0)
        for seed in range(DRAWS):
            with Rounding(seed, exact):
                there = {name: result.detach() for name, result in compute()}
            largest = {name: max(found, distance(there[name], here[name])) for name, found in largest.items()}
    return {name: BOTH * found for name, found in largest.items()}
