"""Parts of attention that the references of several ops share."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor


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


def without_autocast(x: Tensor) -> Any:
    """Within it, products on x's device have the types of what is multiplied."""
    if x.device.type == "meta":  # knows no autocast
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def tokens(x: Tensor, index: Tensor) -> Tensor:
    """[B, H, N, d] at [B, n] -> [B, H, n, d]."""
    batch, heads, _, dim = x.shape
    return x.gather(2, index[:, None, :, None].expand(batch, heads, -1, dim))
