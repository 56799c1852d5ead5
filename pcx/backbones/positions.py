"""Position embeddings, which belong to an image size and can be resampled to another."""

from __future__ import annotations

import math
from typing import Any

from timm.layers import resample_abs_pos_embed
from torch import Tensor

# Last parts of the names under which timm and Hugging Face keep them.
_NAMES = ("pos_embed", "position_embeddings", "relative_position_bias_table")


def are_positions(name: str) -> bool:
    """Whether a tensor of that dotted name has values for the places of an image's patches."""
    return name.rpartition(".")[2] in _NAMES


def resampled(name: str, saved: Tensor, wanted: Tensor, grid: tuple[int, int]) -> Tensor:
    """Position embeddings for another image size, as timm resamples them; others as they are.

    Args:
        name: dotted name of the tensor.
        saved: [1, P + h * h, D] with P prefix tokens.
        wanted: a tensor of the shape that is needed, [1, P + H * W, D].
        grid: (H, W) of the model.
    """
    if saved.shape == wanted.shape or not are_positions(name) or saved.dim() != 3:
        return saved
    prefix = wanted.shape[1] - grid[0] * grid[1]
    side = math.isqrt(max(0, saved.shape[1] - prefix))
    if prefix < 0 or side * side + prefix != saved.shape[1] or saved.shape[2] != wanted.shape[2]:
        return saved
    return resample_abs_pos_embed(saved, list(grid), [side, side], num_prefix_tokens=prefix).to(
        saved.dtype
    )


def grid_of(backbone: Any, spec: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches of an image of that size (H, W)."""
    embed: Any = getattr(backbone, "patch_embed", None)
    if hasattr(embed, "dynamic_feat_size"):
        return embed.dynamic_feat_size(size)
    side = math.isqrt((spec.patch_elements or 3) // 3)
    return size[0] // side, size[1] // side
