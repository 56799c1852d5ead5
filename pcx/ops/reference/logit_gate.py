"""The gradient of `pcx.ops.logit_gate` in plain torch."""

from __future__ import annotations

import math

from torch import Tensor


def prefix_logit_gradient(
    grad_out: Tensor,
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> Tensor:
    """The gradient of the loss by the logits of each prefix key, summed over queries; [B, H, m].

    It is sum_n P (dP - delta), where P are the attention weights of the prefix [H, m, d] or
    [B, H, m, d]. The weights of the other keys are not needed.
    """
    wide = lse.dtype
    delta = (grad_out.to(wide) * out.to(wide)).sum(-1, keepdim=True)  # [B, H, N, 1]
    nothing = lse == -math.inf  # such a row has no weights
    logits = (q @ prefix_k.transpose(-2, -1)).to(wide) * scale  # [B, H, N, m]
    weights = (logits - lse.masked_fill(nothing, math.inf)[..., None]).exp()
    inner = (grad_out @ prefix_v.transpose(-2, -1)).to(wide)
    return (weights * (inner - delta)).sum(-2)
