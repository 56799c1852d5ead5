"""`prompt_score` in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def prompt_score(
    gradient: Tensor, prompts: Tensor, layer_norm: bool, weight: Tensor | None, eps: float
) -> Tensor:
    """`pcx.ops.prompt_score.prompt_score` step by step; the arguments must have been checked."""
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
