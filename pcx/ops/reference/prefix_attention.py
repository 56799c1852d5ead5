"""`pcx.prefix_attention` in plain torch, by concatenating the prefix and the own keys."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pcx.ops.reference.attention import additive, without_autocast


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    prefix_index: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """`pcx.prefix_attention` by concatenation; the arguments must have been checked."""
    if prefix_lengths is not None:  # what lies behind the lengths may be anything, NaN as well
        absent = _absent(prefix_k.shape[-2], prefix_lengths)[:, None, :, None]  # [G, 1, m, 1]
        prefix_k, prefix_v = prefix_k.masked_fill(absent, 0), prefix_v.masked_fill(absent, 0)
    keys = _joined(prefix_k, k, prefix_index)  # [B, H, m+S, d]
    values = _joined(prefix_v, v, prefix_index)  # [B, H, m+S, dv]
    mask = _joint_bias(q, k, prefix_k.shape[-2], prefix_index, prefix_lengths, bias)
    as_sdpa = bias is None or bias.dtype in (torch.bool, q.dtype)  # it would round a wider bias
    if as_sdpa and not return_lse:
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    with without_autocast(q):
        logits = q.to(wide) @ keys.to(wide).transpose(-2, -1) * scale  # [B, H, N, m+S]
    if mask is not None:
        logits = logits + mask.to(wide)
    nothing = (logits == -math.inf).all(-1, keepdim=True)  # such a row gives zeros, as SDPA does
    logits = logits.masked_fill(nothing, 0)
    lse = logits.logsumexp(dim=-1, keepdim=True)  # [B, H, N, 1]
    weights = logits.softmax(-1).masked_fill(nothing, 0)
    with without_autocast(q):
        out = (weights @ values.to(wide)).to(v.dtype)
    return (out, lse.masked_fill(nothing, -math.inf).squeeze(-1)) if return_lse else out


def _absent(m: int, lengths: Tensor) -> Tensor:
    """Which places of a prefix lie behind its length: [G] -> [G, m] boolean."""
    return torch.arange(m, device=lengths.device) >= lengths[:, None]


def _joined(prefix: Tensor, own: Tensor, index: Tensor | None) -> Tensor:
    if prefix.shape[-2] == 0 and not prefix.requires_grad:  # concatenating nothing would still copy
        return own
    if index is not None:
        prefix = prefix.index_select(0, index)
    return torch.cat([prefix.expand(own.shape[0], *prefix.shape[-3:]), own], dim=-2)


def _joint_bias(
    q: Tensor,
    k: Tensor,
    m: int,
    index: Tensor | None,
    lengths: Tensor | None,
    bias: Tensor | None,
) -> Tensor | None:
    """One additive bias over the [prefix; own] keys, or None if there is nothing to add."""
    if bias is None and lengths is None:
        return None
    dtype = q.dtype
    if bias is not None and bias.is_floating_point():
        dtype = torch.promote_types(dtype, bias.dtype)
    zeros = q.new_zeros(1, 1, 1, k.shape[-2], dtype=dtype)
    own = zeros if bias is None else additive(bias, dtype)
    front = q.new_zeros(1, 1, 1, m, dtype=dtype)
    if lengths is not None:
        absent = _absent(m, lengths if index is None else lengths[index])  # [B, m]
        front = front.masked_fill(absent[:, None, None], -math.inf)
    own = own.expand(*own.shape[:-1], k.shape[-2])
    shape = torch.broadcast_shapes(own.shape[:-1], front.shape[:-1])
    return torch.cat([front.expand(*shape, m), own.expand(*shape, k.shape[-2])], dim=-1)
