"""`add_layer_norm` in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def add_layer_norm(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`pcx.ops.add_layer_norm.add_layer_norm` step by step; without y the sum is empty."""
    total = x if y is None else x + y
    wide = torch.promote_types(total.dtype, torch.float32)
    weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    normed = F.layer_norm(total.to(wide), total.shape[-1:], weight, bias, eps).to(dtype)
    return (total if y is not None else x.new_empty(0)), normed
