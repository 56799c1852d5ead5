"""The gradient by a prefix's attention logits, against autograd through a bias on them."""

import pytest
import torch
import torch.nn.functional as F

from pcx import prefix_attention
from pcx.ops.logit_gate import logit_gate

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def inputs(dtype, device, sets=(), batch=3, heads=2, n=33, m=7, dim=24):
    generator = torch.Generator().manual_seed(n + m)

    def rand(*shape):
        made = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return made.to(device, dtype).requires_grad_()

    shapes = [(batch, heads, n, dim)] * 3 + [(*sets, heads, m, dim)] * 2
    return [rand(*shape) for shape in shapes], torch.randn(
        batch, heads, n, dim, generator=generator, dtype=torch.float64
    ).to(device, dtype)


def gated(tensors, grad_out, scale):
    """The gradients by the gate and by the tensors."""
    q, _, _, keys, values = tensors
    gate = torch.zeros(q.shape[0], keys.shape[-2], dtype=q.dtype, device=q.device)
    gate.requires_grad_()
    out, lse = prefix_attention(*tensors, scale=scale, return_lse=True)
    out = logit_gate(out, gate, q, keys, values, lse, scale)
    return torch.autograd.grad(out, [gate, *tensors], grad_out)


def biased(tensors, grad_out, scale):
    q, k, v, keys, values = tensors
    gate = torch.zeros(q.shape[0], keys.shape[-2], dtype=q.dtype, device=q.device)
    gate.requires_grad_()
    joined = [
        torch.cat([p.expand(len(q), *p.shape[-3:]), x], 2) for p, x in ((keys, k), (values, v))
    ]
    bias = F.pad(gate, (0, k.shape[2]))[:, None, None]
    out = F.scaled_dot_product_attention(q, *joined, attn_mask=bias, scale=scale)
    return torch.autograd.grad(out, [gate, *tensors], grad_out)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sets", [(), (3,)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 3e-2), (torch.float16, 5e-3)],
)
def test_equals_autograd_through_a_bias(device, sets, dtype, tolerance):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    tensors, grad_out = inputs(dtype, device, sets)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    expected = biased(wide, grad_out.double(), 0.3)
    for found, right in zip(gated(tensors, grad_out, 0.3), expected, strict=True):
        assert (found.double() - right).norm() <= tolerance * right.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("m", "n", "dim"), [(1, 1, 64), (200, 197, 64), (70, 50, 80)])
def test_of_many_prompts_and_tokens(device, m, n, dim):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    tensors, grad_out = inputs(torch.float32, device, n=n, m=m, dim=dim)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    expected = biased(wide, grad_out.double(), 0.2)[0]
    found = gated(tensors, grad_out, 0.2)[0].double()
    assert (found - expected).norm() <= 1e-4 * expected.norm()


def test_opcheck():
    (q, _, _, keys, values), grad_out = inputs(torch.float32, "cpu")
    lse = torch.full(q.shape[:3], 4.0)
    arguments = [t.detach() for t in (grad_out, q, keys, values, q)]
    torch.library.opcheck(torch.ops.pcx.prefix_logit_gradient.default, (*arguments, lse, 0.3))
