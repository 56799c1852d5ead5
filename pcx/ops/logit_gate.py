"""The derivative of a loss by the attention logits of a prefix, which removing its keys changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pcx.ops import registration  # noqa: F401  defines the operation


def logit_gate(
    out: Tensor,
    gate: Tensor,
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    lse: Tensor,
    scale: float,
) -> Tensor:
    """Makes `gate` a leaf whose gradient is that by a number added to a prefix key's logits.

    That is the sum over heads and queries of P * (dP - delta), the column sums of the softmax's
    gradient, from what attention gave; no attention matrix is kept.

    Args:
        out: [B, H, N, d], the output of attention over the prefix and other keys.
        gate: [B, m], zeros.
        q: [B, H, N, d].
        prefix_k: [H, m, d], or [B, H, m, d].
        prefix_v: the same shape.
        lse: [B, H, N], as `pcx.prefix_attention` returns it.
        scale: factor on the logits.

    Returns:
        `out`, to be used in its place.
    """
    tensors = (q, prefix_k, prefix_v)
    return _LogitGate.apply(out, gate, *(t.detach().to(out.dtype) for t in tensors), lse, scale)


class _LogitGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out, gate, q, prefix_k, prefix_v, lse, scale):
        ctx.save_for_backward(q, prefix_k, prefix_v, out.detach(), lse.detach())
        ctx.scale, ctx.dtype = scale, gate.dtype
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor):  # type: ignore[override]
        slopes = torch.ops.pcx.prefix_logit_gradient(grad_out, *ctx.saved_tensors, ctx.scale)
        return grad_out, slopes.sum(1).to(ctx.dtype), None, None, None, None, None
