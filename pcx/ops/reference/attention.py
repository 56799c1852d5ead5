"""Parts of attention that several references share."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor


def additive(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias as a tensor of rank 4 that can be added to logits.

    A boolean bias becomes 0 where it is True and minus infinity where it is False.
    """
    bias = bias.reshape((1,) * (4 - bias.dim()) + bias.shape)
    if bias.dtype != torch.bool:
        return bias.to(dtype)
    return torch.zeros_like(bias, dtype=dtype).masked_fill(~bias, -math.inf)


def cls_attention(q: Tensor, k: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """The attention of the first token, [CLS], to each token, mean over heads; [B, S]."""
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
    """A context that turns autocast off on x's device, so that products keep their dtypes."""
    if x.device.type == "meta":  # the meta device has no autocast
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def tokens(x: Tensor, index: Tensor) -> Tensor:
    """The rows of x [B, H, N, d] at the tokens `index` [B, n]; [B, H, n, d]."""
    batch, heads, _, dim = x.shape
    return x.gather(2, index[:, None, :, None].expand(batch, heads, -1, dim))
