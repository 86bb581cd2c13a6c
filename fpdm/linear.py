"""Linear layers; in float32 on a CPU by oneDNN, PyTorch's own choice for 16 bits.

For float32 PyTorch calls MKL, which on AMD's processors leaves AVX-512 idle: oneDNN takes half the time there, and the
same on Intel's. It reaches oneDNN's products by operators that have no gradient, which is therefore written here.
"""

import math
import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

GELU_SLOPE = 2 * math.sqrt(2 / math.pi)

_onednn: Callable[..., Tensor] | None = None
if platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available():  # elsewhere nothing was measured
    _onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.7 and later


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K), weight (N, K), bias (N,) -> x @ weight.T + bias (..., N)."""
    if not _suits_onednn(x, weight):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else _product(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The tanh approximation of GELU of `linear`, (..., K) -> (..., N).

    Without a graph it is applied while the product is in the cache.
    """
    if torch.is_grad_enabled() or not _suits_onednn(x, weight):
        return F.gelu(linear(x, weight, bias), approximate="tanh")
    return _product(x, weight, bias, "gelu", "tanh")


def add_gelu(x: Tensor, term: Tensor) -> Tensor:
    """The tanh approximation of GELU of x + term, both (..., N).

    On a CPU without a graph it takes the place of x.
    """
    if torch.is_grad_enabled() or not _suits_onednn(x, term):
        return F.gelu(x + term, approximate="tanh")
    x.add_(term)
    # x (1 + tanh(u / 2)) / 2 is x sigmoid(u), and on a CPU torch's sigmoid takes an eighth of its tanh's time.
    u = x.square().mul_(0.044715 * GELU_SLOPE).add_(GELU_SLOPE).mul_(x)
    return x.mul_(u.sigmoid_())


class Linear(nn.Linear):
    """torch.nn.Linear through `linear`: (..., K) -> (..., N)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Not for what has no rows, nor in a program that is exported, which is to run elsewhere too."""
    if _onednn is None or _is_exporting():
        return False
    floats: bool = x.dtype == weight.dtype == torch.float32
    return floats and x.device.type == "cpu" and x.ndim > 1 and x.numel() > 0


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none", approximation: str = ""
) -> Tensor:
    bias = None if bias is None else bias.contiguous()  # it would be read as if it were
    call = _opaque if torch.compiler.is_compiling() else _onednn
    assert call is not None
    return call(_dense(x), _dense(weight), bias, activation, [], approximation)


# The schema is spelled out because torch before 2.7 does not read it from these annotations.
@torch.library.custom_op(
    "fpdm::onednn",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, str activation, float[] scalars, str approximation) -> Tensor",
)
def _opaque(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, scalars: list[float], approximation: str
) -> Tensor:
    """For torch.compile, which by itself takes oneDNN's operator for frozen weights alone."""
    assert _onednn is not None
    return _onednn(x, weight, bias, activation, scalars, approximation)


@_opaque.register_fake
def _shape(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def _dense(x: Tensor) -> Tensor:
    """For strides that skip numbers oneDNN has but a reference implementation, hundreds of times slower."""
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)  # (..., N) -> (M, N)
        wanted = ctx.needs_input_grad
        return (
            _product(gradient, weight.T) if wanted[0] else None,
            _product(rows.T, x.flatten(0, -2).T) if wanted[1] else None,  # (N, M) @ (M, K)
            rows.sum(0) if wanted[2] else None,
        )
