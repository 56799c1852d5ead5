"""The derivative of a loss by the attention logits of a prefix, for scoring its keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pcx.ops import hardware
from pcx.ops.checks import triton_cannot_attend
from pcx.ops.dispatch import Backend, Dispatch
from pcx.ops.library import LIBRARY, wide
from pcx.ops.reference import logit_gate as reference


def logit_gate(
    out: Tensor,
    gate: Tensor,
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    lse: Tensor,
    scale: float,
    *,
    backend: str = "auto",
) -> Tensor:
    """Lets the gradient of `gate` be the loss's derivative by the logits of each prefix key.

    That is, gate[b, i] acts as a number added to the logits of prefix key i in sample b. Its
    gradient is the sum over heads and queries of P * (dP - delta), the column sums of the softmax's
    gradient. It is computed from attention's outputs; no attention matrix is kept.

    Args:
        out: [B, H, N, d], the output of attention over the prefix and other keys.
        gate: [B, m], zeros that require a gradient.
        q: [B, H, N, d].
        prefix_k: [H, m, d] or [B, H, m, d].
        prefix_v: the same shape as prefix_k.
        lse: [B, H, N], as `pcx.prefix_attention` returns it.
        scale: factor on the logits.
        backend: backend of the gradient: "triton" (on CUDA) or "reference" (torch). "auto" is the
            first of these that can run.

    Returns:
        `out`, to be used in its place.

    Raises:
        ValueError: no backend has that name, or the backend asked for cannot run.
    """
    q, prefix_k, prefix_v = (t.detach().to(out.dtype) for t in (q, prefix_k, prefix_v))
    run = DISPATCH.own_run(backend, q, out, scale) or torch.ops.pcx.prefix_logit_gradient
    return _LogitGate.apply(out, gate, q, prefix_k, prefix_v, lse, scale, run)


class _LogitGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out, gate, q, prefix_k, prefix_v, lse, scale, run):
        ctx.save_for_backward(q, prefix_k, prefix_v, out.detach(), lse.detach())
        ctx.scale, ctx.dtype, ctx.run = scale, gate.dtype, run
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor):  # type: ignore[override]
        slopes = ctx.run(grad_out, *ctx.saved_tensors, ctx.scale)
        return grad_out, slopes.sum(1).to(ctx.dtype), None, None, None, None, None, None


def _triton_cannot(q: Tensor, out: Tensor, scale: float) -> str | None:
    return triton_cannot_attend(q, out, out, scale)


DISPATCH = Dispatch(
    "q",
    Backend("triton", "cuda", ("triton",), can_run=_triton_cannot),
    Backend("reference", run=reference.prefix_logit_gradient),
)

LIBRARY.define(
    "prefix_logit_gradient(Tensor grad_out, Tensor q, Tensor prefix_k, Tensor prefix_v, "
    "Tensor out, Tensor lse, float scale) -> Tensor"
)


@torch.library.register_fake("pcx::prefix_logit_gradient", lib=LIBRARY)
def _fake(grad_out, q, prefix_k, prefix_v, out, lse, scale):
    return q.new_empty((*q.shape[:2], prefix_k.shape[-2]), dtype=wide(q.dtype))


@torch.library.impl(LIBRARY, "prefix_logit_gradient", "CompositeExplicitAutograd")
def _anywhere(*arguments):
    return reference.prefix_logit_gradient(*arguments)


@torch.library.impl(LIBRARY, "prefix_logit_gradient", "CUDA")
def _on_cuda(grad_out, q, prefix_k, prefix_v, out, lse, scale):
    run = reference.prefix_logit_gradient
    if hardware.TRITON and not _triton_cannot(q, out, scale):
        from pcx.kernels.logit_gate import prefix_logit_gradient as run
    return run(grad_out, q, prefix_k, prefix_v, out, lse, scale)
