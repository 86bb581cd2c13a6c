"""Linear layers and GELU; in float32 on AMD's CPUs with AVX-512 by oneDNN, everywhere else by PyTorch's own layers.

For float32 PyTorch calls MKL, which uses AVX-512 on Intel's processors alone: on AMD's, oneDNN takes half the time. On
an AMD CPU with AVX2 oneDNN is the slower one, for gradients above all. PyTorch reaches its products by operators that
have no gradient, which is therefore written here.
"""

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

GELU_SLOPE = 2 * math.sqrt(2 / math.pi)


def prefers_onednn(capabilities: Mapping[str, Any], max_isa: str = "DEFAULT") -> bool:
    """Whether MKL leaves this CPU's AVX-512 idle and oneDNN does not.

    A stated rule rather than a measurement at the start: a run that is resumed must compute as before.

    Args:
        capabilities: what `torch.cpu.get_capabilities` says of the CPU.
        max_isa: the value of ONEDNN_MAX_CPU_ISA, which keeps oneDNN from newer instructions.
    """
    is_amd = str(capabilities.get("cpu_name", "")).startswith("AMD")
    return is_amd and bool(capabilities.get("avx512_f")) and max_isa.startswith(("DEFAULT", "ALL", "AVX512", "AVX10"))


_operator: Callable[..., Tensor] | None = None  # oneDNN's linear layer, where this build of PyTorch has it
if torch.backends.mkldnn.is_available():
    _operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_capabilities: Callable[[], Mapping[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)  # older torch: none
_uses_onednn = (
    _operator is not None
    and torch.backends.mkl.is_available()
    and prefers_onednn(_capabilities(), os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper())
)
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.7 and later


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K), weight (N, K), bias (N,) -> x @ weight.T + bias (..., N)."""
    if not suits_onednn(x, weight):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else _product(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The tanh approximation of GELU of `linear`, (..., K) -> (..., N)."""
    if not torch.is_grad_enabled() and suits_onednn(x, weight):
        return _product(x, weight, bias, "gelu", "tanh")  # while the product is in the cache
    return _gelu(linear(x, weight, bias))


def add_gelu(x: Tensor, term: Tensor) -> Tensor:
    """The tanh approximation of GELU of x + term, both (..., N).

    On a CPU without a graph it takes the place of x.
    """
    return _gelu(x + term if torch.is_grad_enabled() or x.device.type != "cpu" else x.add_(term))


def _gelu(x: Tensor) -> Tensor:
    """The tanh approximation of GELU; in float32 on a CPU without a graph it takes the place of x.

    x (1 + tanh(u / 2)) / 2 is x sigmoid(u), and on a CPU torch's sigmoid takes an eighth of its tanh's time.
    """
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != torch.float32 or _is_exporting():
        return F.gelu(x, approximate="tanh")
    u = x.square().mul_(0.044715 * GELU_SLOPE).add_(GELU_SLOPE).mul_(x)
    return x.mul_(u.sigmoid_())


class Linear(nn.Linear):
    """torch.nn.Linear through `linear`: (..., K) -> (..., N)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def suits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` takes oneDNN for x (..., K) and weight (N, K).

    Not for what has no rows, nor in a program that is exported, which is to run elsewhere too.
    """
    if not _uses_onednn or _is_exporting():
        return False
    floats: bool = x.dtype == weight.dtype == torch.float32
    return floats and x.device.type == "cpu" and x.ndim > 1 and x.numel() > 0


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none", approximation: str = ""
) -> Tensor:
    bias = None if bias is None else bias.contiguous()  # it would be read as if it were
    call = _opaque if torch.compiler.is_compiling() else _operator
    assert call is not None
    return call(_dense(x), _dense(weight), bias, activation, [], approximation)


# The schema is spelled out because torch before 2.7 does not read it from these annotations.
@torch.library.custom_op(
    f"{__name__.partition('.')[0]}::onednn",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, str activation, float[] scalars, str approximation) -> Tensor",
)
def _opaque(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, scalars: list[float], approximation: str
) -> Tensor:
    """For torch.compile, which by itself takes oneDNN's operator for frozen weights alone."""
    assert _operator is not None
    return _operator(x, weight, bias, activation, scalars, approximation)


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
