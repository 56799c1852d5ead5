"""`pcx.weighted_pagerank` in plain torch, which stores the attention matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pcx.ops.reference.attention import tokens, without_autocast


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
    """`pcx.weighted_pagerank` by matrix products; the arguments must have been checked."""
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
        nothing = (logits == -math.inf).all(-1, keepdim=True)  # such a row attends to no token
        attention = logits.softmax(-1).masked_fill(nothing, 0)[..., -q.shape[2] :]
        scores = init[..., None]
        for _ in range(iters):
            scores = attention.transpose(-2, -1) @ scores
            total = scores.sum(-2, keepdim=True)
            scores = torch.where(total == 0, 1 / max(q.shape[2], 1), scores / total)
    return scores[..., 0].clone()
