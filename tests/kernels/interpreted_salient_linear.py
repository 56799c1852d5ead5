"""Run by test_salient_linear.py with TRITON_INTERPRET=1: Triton's kernel on the CPU."""

import pytest
import torch

from pcx.kernels import salient_linear as kernel
from pcx.kernels import salient_linear_gradient as gradient_kernel
from pcx.ops.reference import salient_linear as reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("product", [torch.float32, torch.float16])
@pytest.mark.parametrize("norm", ["none", "plain", "affine"])
@pytest.mark.parametrize(
    ("rows", "dim", "count"), [(1, 1, 1), (5, 24, 8), (17, 40, 33), (18, 300, 70), (3, 96, 96)]
)
def test_the_map_and_its_norm(dtype, product, norm, rows, dim, count):
    generator = torch.Generator().manual_seed(rows + dim)
    x = torch.randn(1, rows, dim, generator=generator).to(dtype)
    index = torch.randperm(dim, generator=generator)[:count]
    weight = torch.randn(count, count, generator=generator) / count**0.5
    bias, affine = torch.randn(count, generator=generator), torch.randn(2, dim, generator=generator)
    affine = affine if norm == "affine" else (None, None)
    rest = (index, weight.to(product), bias, 0.3, *affine, 1e-5)
    of_norm = None if norm == "none" else dtype
    changed, wanted = x.clone(), x.double()
    found = kernel.salient_linear(changed, *rest, of_norm, product, True)
    wide = [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in rest]
    of_norm = None if norm == "none" else torch.float64
    expected = reference.salient_linear(wanted, *wide, of_norm, torch.float64, True)
    tolerance = 1e-5 if dtype == product == torch.float32 else 1e-2
    for each, right in zip((changed, *found), (wanted, *expected), strict=True):
        assert each.shape == right.shape
        if dim > 1 or right is not expected[3]:
            torch.testing.assert_close(each.double(), right, rtol=tolerance, atol=tolerance)
    others = sorted({*range(dim)} - {*index.tolist()})
    assert torch.equal(changed[..., others], x[..., others])
    short = kernel.salient_linear(x.clone(), *rest, dtype, product, False)
    assert [t.numel() for t in short] == [x.numel(), 0, 0, 0]


def test_nothing():
    rest = (torch.tensor([1]), torch.ones(1, 1), torch.ones(1), 1.0, None, None, 1e-5)
    found = kernel.salient_linear(torch.zeros(0, 3, 16), *rest, torch.float32, torch.float32, True)
    assert [tuple(t.shape) for t in found] == [(0, 3, 16), (0, 3, 1), (0, 3, 1), (0, 3, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("product", [torch.float32, torch.float16])
@pytest.mark.parametrize("norm", ["none", "plain", "affine"])
@pytest.mark.parametrize("read", ["x", "both", "normed"])
@pytest.mark.parametrize(("rows", "dim", "count"), [(5, 24, 8), (18, 300, 70)])
def test_gradients_of_rows(dtype, product, norm, read, rows, dim, count):
    if norm == "none" and read != "x":
        pytest.skip("there are no normed rows")
    generator = torch.Generator().manual_seed(rows + dim)
    x, grad_x, grad_normed = (
        torch.randn(1, rows, dim, generator=generator).to(dtype) for _ in range(3)
    )
    index = torch.randperm(dim, generator=generator)[:count]
    weight = torch.randn(count, count, generator=generator) / count**0.5
    mean, rstd = x.float().mean(-1, keepdim=True), 1 / x.float().std(-1, keepdim=True)
    of_norm = [None] * 4 if norm == "none" else [x, mean, rstd, None]
    if norm == "affine":
        of_norm[3] = torch.randn(dim, generator=generator)
    grads = [None if read == "normed" else grad_x, None if read == "x" else grad_normed]
    arguments = (*grads, index, weight.to(product), 0.3, *of_norm)
    found = gradient_kernel.row_gradients(*arguments, product)
    wide = [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in arguments]
    expected = reference.row_gradients(*wide, torch.float64)
    assert [t.dtype for t in found] == [dtype, product]
    tolerance = 1e-5 if dtype == product == torch.float32 else 1e-2
    for each, right in zip(found, expected, strict=True):
        torch.testing.assert_close(each.double(), right, rtol=tolerance, atol=tolerance)
