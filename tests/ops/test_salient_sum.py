"""salient_sum against the literal sum, map and norm."""

import pytest
import torch
from salient import DEVICES, assert_near, exact, tensors

from pcx.ops.library import EXTENSION
from pcx.ops.salient_sum import salient_sum


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "of_y", "narrow"),
    [
        (torch.float64, torch.float64, None),
        (torch.float32, torch.float32, None),
        (torch.bfloat16, torch.bfloat16, None),
        (torch.float32, torch.bfloat16, torch.bfloat16),  # a block's under autocast
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float16, torch.float16, None),
    ],
)
@pytest.mark.parametrize(("shape", "count"), [((2, 5, 64), 32), ((1, 3, 24), 7), ((40, 768), 96)])
def test_it_is_the_sum_the_map_and_the_norm(device, dtype, of_y, narrow, shape, count):
    x, index, weight, bias, *affine = tensors(shape, count, dtype, device)
    y = (x.flip(0).flip(1) * 0.5).to(of_y)
    before = x.clone(), y.clone()
    wide, product = torch.promote_types(dtype, of_y), narrow or dtype
    for norm in ((*affine, 1e-6), (None, None, 1e-5)):
        wanted, normed = exact(x.double() + y.double(), index, weight, bias, 0.3, norm)
        with torch.autocast(device, product, enabled=narrow is not None):
            total, found = salient_sum(x, y, index, weight, bias, 0.3, norm=norm)
        assert (total.dtype, found.dtype) == (wide, narrow or wide)
        least = 1e-12 if dtype == torch.float64 else 2e-5
        assert_near(total, wanted, product, least)
        assert_near(found, normed, product, 10 * least)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_that_learn_get_their_gradients(device):
    x, index, weight, bias, *affine = tensors((2, 5, 24), 7, torch.float32, device)
    leaves = [t.clone().requires_grad_() for t in (x, x.flip(1), weight, bias)]
    given, added, *rest = leaves
    total, normed = salient_sum(given, added, index, *rest, norm=(*affine, 1e-5))
    found = torch.autograd.grad((total * normed).sum(), leaves)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    total, normed = exact(wide[0] + wide[1], index, *wide[2:], norm=(*affine, 1e-5))
    wanted = torch.autograd.grad((total * normed).sum(), wide)
    for each, right in zip(found, wanted, strict=True):
        assert_near(each, right, torch.float32, 5e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif("cuda" not in EXTENSION, reason="needs the CUDA extension")
@pytest.mark.parametrize("rows", [1, 15, 197, 12608])
@pytest.mark.parametrize("count", [1, 96, 192])
def test_the_kernel_takes_any_number_of_rows(rows, count):
    x, index, weight, bias, *affine = tensors((rows, 768), count, torch.float32, "cuda")
    y = (x.flip(1) * 0.5).bfloat16()
    with torch.autocast("cuda", torch.bfloat16):
        total, normed = salient_sum(
            x, y, index, weight, bias, 0.3, norm=(*affine, 1e-6), backend="cuda"
        )
    wanted, rows_normed = exact(x.double() + y.double(), index, weight, bias, 0.3, (*affine, 1e-6))
    assert_near(total, wanted, torch.bfloat16)
    assert_near(normed, rows_normed, torch.bfloat16)


def test_what_does_not_fit_is_named():
    x, index, weight, bias, *affine = tensors((2, 3, 8), 3)
    norm = (*affine, 1e-5)
    for changed, message in (
        ({"y": x[:1]}, r"y: .* of shape \(1, 3, 8\) .* x's shape \(2, 3, 8\)"),
        ({"y": x.long()}, "y: torch.int64"),
        ({"weight": weight[:2]}, "weight: .* expected floating-point numbers"),
        ({"norm": None}, "norm: None, expected a tuple"),
        ({"backend": "fast"}, "backend: got 'fast', expected one of"),
        ({"backend": "cuda"}, "backend: 'cuda' cannot run"),
    ):
        given = {"y": x, "index": index, "weight": weight, "bias": bias, "norm": norm, **changed}
        with pytest.raises(ValueError, match=message):
            salient_sum(x, **given)
