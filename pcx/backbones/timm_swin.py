"""Facts of timm's Swin models that running them does not show: how a block goes on for a prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

# From (block, tokens [B, m, C], what its attention gave for them [B, m, C]) to the block's output.
Residual = Callable[[Any, Tensor, Tensor], Tensor]


def _pre_norm(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    x = x + block.drop_path1(attended)
    return x + block.drop_path2(block.mlp(block.norm2(x)))


def _post_norm(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    x = x + block.drop_path1(block.norm1(attended))
    return x + block.drop_path2(block.norm2(block.mlp(x)))


_RESIDUALS: dict[str, Residual] = {
    "timm.models.swin_transformer.SwinTransformerBlock": _pre_norm,
    "timm.models.swin_transformer_v2.SwinTransformerV2Block": _post_norm,
}


def residual_of(block: nn.Module) -> Residual | None:
    """What a block does behind its attention with tokens that are not in the image, None of others.

    Args:
        block: of a backbone.
    """
    for cls in type(block).__mro__:
        found = _RESIDUALS.get(f"{cls.__module__}.{cls.__qualname__}")
        if found is not None:
            return found
    return None


def merge_alone(downsample: nn.Module, tokens: Tensor) -> Tensor:
    """Tokens [B, m, C], each merged with three copies of itself, as [B, m, 2 * C]."""
    patches = tokens.reshape(-1, 1, 1, tokens.shape[-1]).expand(-1, 2, 2, -1)
    return downsample(patches).view(*tokens.shape[:2], -1)
