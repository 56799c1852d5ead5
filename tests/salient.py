"""What the tests of salient_linear and salient_sum share."""

import pytest
import torch
import torch.nn.functional as F

from pcx.ops.library import EXTENSION

NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = pytest.param("cuda", marks=NEEDS_GPU)
DEVICES = ["cpu", GPU]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KERNELS = [
    pytest.param(
        "cuda",
        marks=[
            *NEEDS_GPU,
            pytest.mark.skipif("cuda" not in EXTENSION, reason="needs the CUDA extension"),
        ],
    ),
    pytest.param("triton", marks=NEEDS_GPU),
]


def tensors(shape=(2, 3, 8), count=3, dtype=torch.float64, device="cpu", learned=None):
    """x, index, W, b, and weight and bias of a norm; W and b of dtype `learned`."""
    generator = torch.Generator().manual_seed(shape[-1] + count)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    dim = shape[-1]
    index = torch.randperm(dim, generator=generator)[:count].to(device)
    weight, bias = draw(count, count) / count**0.5, draw(count)
    weight, bias = (t.to(device, learned or dtype) for t in (weight, bias))
    affine = [(1 + 0.1 * draw(dim)).to(device, dtype), draw(dim).to(device, dtype)]
    return (draw(*shape) + 1).to(device, dtype), index, weight, bias, *affine


def exact(x, index, weight, bias, scale=1.0, norm=None):
    """The changed x and its normed rows in float64, out of place; None without a norm."""
    x, weight, bias = x.double(), weight.double(), bias.double()
    u = x[..., index]
    position = torch.zeros(len(index), x.shape[-1], dtype=x.dtype, device=x.device)
    position[torch.arange(len(index)), index] = 1
    x = x + scale * (u @ weight.T + bias) @ position
    if norm is None:
        return x, None
    *affine, eps = norm
    affine = [None if t is None else t.double() for t in affine]
    return x, F.layer_norm(x, x.shape[-1:], *affine, eps)


def assert_near(found, expected, dtype, least=1e-5):
    """Errors of a few roundings, relative to the size of the whole."""
    if not expected.numel():
        return
    if not expected.numel():
        return
    size = max(1.0, float(expected.abs().max()))
    error = float((found.double() - expected).abs().max()) / size
    assert error < max(least, 4 * torch.finfo(dtype).eps), error
