"""add_layer_norm: against torch's own sum and LayerNorm, on the CPU and on a GPU."""

import pytest
import torch
import torch.nn.functional as F

from pcx.ops.add_layer_norm import DISPATCH, add_layer_norm
from pcx.ops.dispatch import Backend
from pcx.ops.reference import add_layer_norm as reference

NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = pytest.param("cuda", marks=NEEDS_GPU)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tensors(shape, dtype, device, y_dtype=None):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    weight, bias = (torch.randn(shape[-1], generator=generator) for _ in range(2))
    x, y = (x + 3).to(device, dtype), y.to(device, y_dtype or dtype)
    return x, y, weight.to(device), bias.to(device)


def exact(total, weight, bias, eps=1e-5):
    wide = [None if t is None else t.double() for t in (weight, bias)]
    return F.layer_norm(total.double(), total.shape[-1:], *wide, eps)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [4, 64, 132, 192, 384, 768, 1024, 1280, 2048, 2052, 6])
def test_it_is_the_sum_and_its_layer_norm(device, dtype, dim):
    x, y, weight, bias = tensors((3, 7, dim), dtype, device)
    total, normed = add_layer_norm(x, y, weight, bias)
    assert torch.equal(total, x + y)
    assert normed.dtype == dtype
    expected = exact(x + y, weight, bias)
    tolerance = 4 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    torch.testing.assert_close(normed.double(), expected, rtol=tolerance, atol=tolerance)
    same, alone = add_layer_norm(total, None, weight, bias)
    assert same is total
    assert torch.equal(alone, normed)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_autocast_decides_the_dtype(device, narrow):
    x, y, weight, bias = tensors((2, 5, 64), torch.float32, device, narrow)
    with torch.autocast(device, narrow):
        total, normed = add_layer_norm(x, y, weight, bias, 1e-6)
        expected = F.layer_norm(x + y, (64,), weight, bias, 1e-6)
    assert (total.dtype, normed.dtype) == (torch.float32, narrow)
    assert torch.equal(total, x + y)
    tolerance = torch.finfo(narrow).eps
    torch.testing.assert_close(normed, expected.to(narrow), rtol=tolerance, atol=tolerance)
    double = add_layer_norm(x.double(), y.double(), weight.double(), bias.double())
    with torch.autocast(device, narrow):  # leaves float64 alone
        again = add_layer_norm(x.double(), y.double(), weight.double(), bias.double())
    assert torch.equal(again[1], double[1])
    assert again[1].dtype == torch.float64


@pytest.mark.parametrize("device", [GPU])
def test_the_kernel_runs_or_says_why_not(device):
    x, y, weight, bias = tensors((5, 64), torch.float32, device)
    found = add_layer_norm(x, y, weight, None, backend="cuda")
    plain = add_layer_norm(x, y, weight, None, backend="reference")
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(
        add_layer_norm(x, y, None, None, backend="cuda")[1], F.layer_norm(x + y, (64,))
    )
    for given, reason in (
        ((x.double(), y.double()), "float"),
        ((x.bfloat16(), y), "the sum has another dtype than x"),
        ((x[:, :62], y[:, :62]), "a multiple of 4"),
        ((x[:, :60], y[:, :60]), "not contiguous"),
    ):
        dim = given[0].shape[-1]
        with pytest.raises(ValueError, match=f"backend: 'cuda' cannot run: .*{reason}"):
            add_layer_norm(*given, weight[:dim], bias[:dim], backend="cuda")
        total, normed = add_layer_norm(*given, weight[:dim], bias[:dim])
        expected = exact(given[0] + given[1], weight[:dim], bias[:dim])
        torch.testing.assert_close(normed.double(), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(total, given[0] + given[1])


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_gradients_are_torchs_own(device):
    x, y, weight, bias = (t.double() for t in tensors((2, 3, 8), torch.float64, device))
    inputs = [t.requires_grad_() for t in (x, y, weight, bias)]
    assert torch.autograd.gradcheck(add_layer_norm, inputs)


@pytest.mark.parametrize("device", [GPU])
def test_the_kernel_is_not_given_what_is_differentiated(device):
    x, y, weight, bias = tensors((2, 8), torch.float32, device)
    with pytest.raises(ValueError, match="backend: 'cuda' cannot run: it has no gradient"):
        add_layer_norm(x.requires_grad_(), y, weight, bias, backend="cuda")
    with torch.no_grad():
        add_layer_norm(x, y, weight, bias, backend="cuda")


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_gradients_stay_torchs_own_where_a_backend_was_added(device, monkeypatch):
    row = Backend("other", can_run=lambda *a: "it never can", run=reference.add_layer_norm)
    monkeypatch.setattr(DISPATCH, "rows", dict(DISPATCH.rows))
    monkeypatch.setattr(DISPATCH, "_added", [])
    DISPATCH.add(row)
    x, y, weight, bias = tensors((2, 8), torch.float32, device)
    _, normed = add_layer_norm(x.requires_grad_(), y, weight, bias)
    assert torch.autograd.grad(normed.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("with_sum", [True, False])
def test_the_op_keeps_torchs_rules(device, with_sum):
    x, y, weight, bias = tensors((2, 3, 8), torch.float32, device)
    arguments = (x, y if with_sum else None, weight, bias, 1e-5, torch.bfloat16)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.pcx.add_layer_norm.default, arguments, test_utils=checks)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_what_does_not_fit_is_named(device):
    x, y, weight, bias = tensors((2, 3, 8), torch.float32, device)
    for given, message in (
        ((x, y[:1], weight, bias), r"y: shape \(1, 3, 8\), expected \(2, 3, 8\)"),
        ((x, y, weight[:4], bias), r"weight: shape \(4,\), expected \(8,\)"),
        ((x, y, weight, bias.to("meta")), r"bias: on meta, x on"),
        ((x.int(), None, None, None), r"x: torch.int32, expected floating-point"),
    ):
        with pytest.raises(ValueError, match=message):
            add_layer_norm(*given)
