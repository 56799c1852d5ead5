"""Plain torch forms of every operation: the tests' oracle, and the backend that runs anywhere."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """`pcx.prefix_attention` by concatenation; arguments are taken as checked."""
    keys = _joined(prefix_k, k, prefix_index)  # [B, H, m+S, d]
    values = _joined(prefix_v, v, prefix_index)  # [B, H, m+S, dv]
    mask = _joint_bias(q, k, prefix_k.shape[-2], prefix_index, prefix_lengths, bias)
    if not return_lse:
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = (q @ keys.transpose(-2, -1)).to(wide) * scale  # [B, H, N, m+S]
    if mask is not None:
        logits = logits + mask
    nothing = (logits == -math.inf).all(-1, keepdim=True)  # such a row gives zeros, as SDPA's
    logits = logits.masked_fill(nothing, 0)
    lse = logits.logsumexp(dim=-1, keepdim=True)  # [B, H, N, 1]
    weights = (logits - lse).exp().masked_fill(nothing, 0).to(v.dtype)
    return weights @ values, lse.masked_fill(nothing, -math.inf).squeeze(-1)


def _joined(prefix: Tensor, own: Tensor, index: Tensor | None) -> Tensor:
    if prefix.shape[-2] == 0 and not prefix.requires_grad:  # joining nothing would still copy
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
    """One additive bias over [prefix; own] keys, or None where there is nothing to add."""
    if bias is None and lengths is None:
        return None
    own = additive(bias, q.dtype) if bias is not None else q.new_zeros(1, 1, 1, k.shape[-2])
    front = q.new_zeros(1, 1, 1, m)
    if lengths is not None:
        per_sample = lengths if index is None else lengths[index]
        absent = torch.arange(m, device=q.device) >= per_sample[:, None]  # [B, m]
        front = front.masked_fill(absent[:, None, None], -math.inf)
    own = own.expand(*own.shape[:-1], k.shape[-2])
    shape = torch.broadcast_shapes(own.shape[:-1], front.shape[:-1])
    return torch.cat([front.expand(*shape, m), own.expand(*shape, k.shape[-2])], dim=-1)


def additive(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """A bias of rank 4 to add to logits: 0 and minus infinity for a boolean one."""
    bias = bias.reshape((1,) * (4 - bias.dim()) + bias.shape)
    if bias.dtype != torch.bool:
        return bias.to(dtype)
    return torch.zeros_like(bias, dtype=dtype).masked_fill(~bias, -math.inf)


def cls_attention(q: Tensor, k: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """How much the first token, [CLS], attends to each, mean over heads; [B, S]."""
    return cls_logits(q, k, bias, scale).softmax(-1).mean(1)


def cls_logits(q: Tensor, k: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """The attention logits of the first token, [CLS]; [B, H, S]."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = (q[:, :, :1] @ k.transpose(-2, -1)).to(wide) * scale  # [B, H, 1, S]
    if bias is not None:
        logits = logits + additive(bias, wide)[..., :1, :]
    return logits[:, :, 0]


def prefix_logit_gradient(
    grad_out: Tensor,
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> Tensor:
    """What `pcx.ops.logit_gate` differentiates by, from the weights of the prefix alone, [B, H, m].

    The prefix is [H, m, d] or [B, H, m, d].
    """
    wide = lse.dtype
    delta = (grad_out.to(wide) * out.to(wide)).sum(-1, keepdim=True)  # [B, H, N, 1]
    nothing = lse == -math.inf  # such a row has no weights
    logits = (q @ prefix_k.transpose(-2, -1)).to(wide) * scale  # [B, H, N, m]
    weights = (logits - lse.masked_fill(nothing, math.inf)[..., None]).exp()
    inner = (grad_out @ prefix_v.transpose(-2, -1)).to(wide)
    return (weights * (inner - delta)).sum(-2)


def prompt_score(
    gradient: Tensor, prompts: Tensor, layer_norm: bool, weight: Tensor | None, eps: float
) -> Tensor:
    """`pcx.ops.prompt_score.prompt_score` written out; arguments are taken as checked."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    gradient, prompts = gradient.to(wide), prompts.to(wide)
    if layer_norm:
        centred = prompts - prompts.mean(-1, keepdim=True)
        inverse = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
        normed = centred * inverse
        gradient = gradient if weight is None else gradient * weight.to(wide)
        along = (gradient * normed).mean(-1, keepdim=True)
        gradient = inverse * (gradient - gradient.mean(-1, keepdim=True) - normed * along)
    product = gradient * prompts
    return torch.stack([product.norm(dim=-1), product.sum(-1).abs()])


def weighted_pagerank(
    q: Tensor,
    k: Tensor,
    init: Tensor,
    bias: Tensor | None,
    prefix_k: Tensor | None,
    among: Tensor | None,
    iters: int,
    scale: float,
) -> Tensor:
    """`pcx.weighted_pagerank` with the attention matrix written out; arguments as checked."""
    wide = torch.promote_types(q.dtype, torch.float32)
    if among is not None:
        q, k = tokens(q, among), tokens(k, among)
    with without_autocast(q):
        rows = q.to(wide) * scale
        logits = rows @ k.to(wide).transpose(-2, -1)  # [B, H, N, N]
        if bias is not None:
            logits = logits + bias
        if prefix_k is not None:
            logits = torch.cat([rows @ prefix_k.to(wide).transpose(-2, -1), logits], -1)
        nothing = (logits == -math.inf).all(-1, keepdim=True)  # is attended to by such a row
        attention = logits.softmax(-1).masked_fill(nothing, 0)[..., -q.shape[2] :]
        scores = init[..., None]
        for _ in range(iters):
            scores = attention.transpose(-2, -1) @ scores
            scores = scores / scores.sum(-2, keepdim=True)
    return scores[..., 0].clone()


def without_autocast(x: Tensor) -> Any:
    """Within it, products on x's device have the types of what is multiplied."""
    if x.device.type == "meta":  # knows no autocast
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def tokens(x: Tensor, index: Tensor) -> Tensor:
    """[B, H, N, d] at [B, n] -> [B, H, n, d]."""
    batch, heads, _, dim = x.shape
    return x.gather(2, index[:, None, :, None].expand(batch, heads, -1, dim))
