"""Linear layers by oneDNN are torch's, and their gradient is autograd's."""

import pytest
import torch
from torch.nn import functional as F

from fpdm import linear as module
from fpdm.linear import add_gelu, linear, linear_gelu


def operands(*shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(size, generator=generator) for size in ((*shape, 24), (40, 24), (40,)))
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


@pytest.fixture(params=["onednn", "torch"])
def kernels(request, monkeypatch):
    """Both, whichever this machine's CPU would take."""
    if request.param == "onednn" and module._operator is None:
        pytest.skip("this build of PyTorch has no oneDNN")
    monkeypatch.setattr(module, "_uses_onednn", request.param == "onednn")


@pytest.mark.parametrize("shape", [(), (5,), (3, 7), (2, 3, 4), (0,), (3, 0)])
@pytest.mark.usefixtures("kernels")
def test_a_linear_layer_and_its_gradients_are_torchs(shape):
    x, weight, bias = operands(*shape)
    expected = F.linear(x.double(), weight.double(), bias.double())
    found = linear(x, weight, bias)
    torch.testing.assert_close(found, expected.float())
    upstream = torch.linspace(-1, 1, found.numel()).reshape(found.shape)
    gradients = torch.autograd.grad(found, (x, weight, bias), upstream)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, (x, weight, bias), upstream), strict=True):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize(
    ("cpu_name", "avx512_f", "max_isa", "expected"),
    [
        ("AMD EPYC 9R14", True, "DEFAULT", True),
        ("AMD EPYC 9R14", True, "AVX512_CORE_BF16", True),
        ("AMD EPYC 9R14", True, "AVX2", False),
        ("AMD EPYC", False, "DEFAULT", False),
        ("Intel Xeon Platinum 8481C", True, "DEFAULT", False),
        ("Virtual CPU", True, "DEFAULT", False),
    ],
)
def test_onednn_is_taken_where_mkl_leaves_avx_512_idle(cpu_name, avx512_f, max_isa, expected):
    assert module.prefers_onednn({"cpu_name": cpu_name, "avx512_f": avx512_f}, max_isa) == expected


def test_a_cpu_that_torch_says_nothing_of_takes_torchs_layers():
    assert not module.prefers_onednn({})


@pytest.mark.usefixtures("kernels")
def test_a_slice_of_a_weight_a_frozen_weight_and_no_bias_are_taken():
    x, weight, _ = operands(3, 7)
    half = weight.detach()[:, ::2]  # strides that skip numbers
    found = linear(x[..., :12], half)
    torch.testing.assert_close(found, F.linear(x[..., :12], half))
    torch.testing.assert_close(torch.autograd.grad(found.sum(), x)[0][..., :12], half.sum(0).expand(3, 7, 12))


@pytest.mark.parametrize("stride", [0, 1, 2])
@pytest.mark.usefixtures("kernels")
def test_operands_of_any_strides_are_taken(stride):
    x, weight, bias = (operand.detach() for operand in operands(3, 7))
    bias = bias.repeat(2).as_strided((40,), (stride,))
    for given in (x, x.mT.contiguous().mT, x[:1].expand(3, -1, -1)):
        torch.testing.assert_close(linear(given, weight, bias), F.linear(given, weight, bias))
        torch.testing.assert_close(linear(given, weight.T.contiguous().T, bias), F.linear(given, weight, bias))


@pytest.mark.usefixtures("kernels")
def test_a_graph_that_is_kept_gives_the_same_gradient_again():
    x, weight, bias = operands(3, 7)
    loss = linear(x, weight, bias).square().sum()
    first = torch.autograd.grad(loss, (x, weight, bias), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, (x, weight, bias)), strict=True))


@pytest.mark.parametrize("shape", [(5,), (3, 7)])
@pytest.mark.usefixtures("kernels")
def test_compiling_keeps_the_product_its_gelu_and_the_gradients(shape):
    seen = []

    def backend(traced, _):
        seen.extend(str(node.target) for node in traced.graph.nodes)
        return traced.forward

    def gelu():
        return linear_gelu(x, weight, bias)

    x, weight, bias = operands(*shape)
    expected = torch.autograd.grad(gelu().square().sum(), (x, weight, bias))
    found = torch.autograd.grad(torch.compile(gelu, backend="aot_eager")().square().sum(), (x, weight, bias))
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(gelu, backend=backend)(), gelu())
        if module._uses_onednn:
            torch.library.opcheck(module._opaque, (x, weight, bias, "gelu", [], "tanh"))
    assert ("fpdm.onednn.default" in seen) == module._uses_onednn


@pytest.mark.usefixtures("kernels")
def test_an_exported_layer_holds_torchs_operators_alone():
    x, _, _ = operands(3, 7)
    operators = {str(node.target) for node in torch.export.export(module.Linear(24, 40), (x,)).graph.nodes}
    assert "aten.linear.default" in operators
    assert not any("onednn" in name or "mkldnn" in name for name in operators)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.usefixtures("kernels")
def test_the_gelu_without_a_graph_is_the_one_with_it(dtype):
    x, weight, bias = (operand.to(dtype) for operand in operands(3, 7))
    term = torch.linspace(-6, 6, 3 * 7 * 40).reshape(3, 7, 40).to(dtype)
    with_graph = linear_gelu(x, weight, bias), add_gelu(linear(x, weight), term)
    with torch.no_grad():
        without = linear_gelu(x, weight, bias), add_gelu(linear(x, weight), term)
    tolerance = {"rtol": 1e-5, "atol": 2e-6} if dtype != torch.bfloat16 else {}
    for one, other in zip(with_graph, without, strict=True):
        assert one.requires_grad
        assert not other.requires_grad
        torch.testing.assert_close(other, one.detach(), **tolerance)
