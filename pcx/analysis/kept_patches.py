"""Draws the patches that are left after each pruning layer over the images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pcx.extras import need

if TYPE_CHECKING:
    from pcx.token_pruning.dropping import Pruning

WHITENESS = 0.85  # share of white in a patch that was dropped


def kept_masks(pruning: Pruning, height: int, width: int) -> list[Tensor]:
    """Masks of the pixels whose patch is left, one per pruning step.

    Args:
        pruning: the handle of a model that images went through.
        height, width: size of those images, pixels.

    Returns:
        One mask [B, height, width] per step, boolean.

    Raises:
        ValueError: the images of the last batch had another size, or patches are not square.
    """
    side = math.isqrt(pruning.patch_pixels)
    if side**2 != pruning.patch_pixels:
        raise ValueError(
            f"pruning: its patches of {pruning.patch_pixels} pixels are not square; only square "
            "patches can be drawn"
        )
    rows, columns = height // side, width // side
    kept, came = pruning.kept, pruning.tokens - pruning.prefix_tokens
    if rows * columns != came:
        raise ValueError(
            f"height, width: {height} x {width} has {rows * columns} patches of {side} x {side}, "
            f"the images of the last batch had {came}; give their size"
        )
    masks = []
    for places in kept:
        left = torch.zeros(len(places), pruning.prefix_tokens + rows * columns, dtype=torch.bool)
        left.scatter_(1, places.cpu(), True)
        grid = left[:, pruning.prefix_tokens :].unflatten(1, (rows, columns))
        masks.append(grid.repeat_interleave(side, 1).repeat_interleave(side, 2))
    return masks


def draw_kept(images: Tensor, pruning: Pruning, file: Path) -> None:
    """Draws each image of the last batch beside what is left of it after each step (Fig. 5).

    Args:
        images: [B, 3, H, W] between 0 and 1, as they are shown. The model may have seen them
            normalised.
        pruning: the handle of the model that the images went through.
        file: where the figure is written; the name's ending says the format.
    """
    batch, _, height, width = images.shape
    masks = kept_masks(pruning, height, width)
    need("matplotlib", "a picture of kept patches")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 * (1 + len(masks)), 1.6 * batch + 0.3), layout="constrained")
    grid = figure.subplots(batch, 1 + len(masks), squeeze=False)
    shown = images.detach().cpu().float().clamp(0, 1)
    grid[0, 0].set_title(
        f"{masks[0].shape[1] * masks[0].shape[2] // pruning.patch_pixels} patches", fontsize=9
    )
    for axes, image in zip(grid[:, 0], shown, strict=True):
        axes.imshow(image.permute(1, 2, 0).numpy())
    for column, (step, mask) in enumerate(zip(pruning.steps, masks, strict=True), 1):
        count = int(mask[0].sum()) // pruning.patch_pixels
        grid[0, column].set_title(f"layer {step.layer}: {count}", fontsize=9)
        faded = torch.where(mask[:, None], shown, WHITENESS + (1 - WHITENESS) * shown)
        for axes, image in zip(grid[:, column], faded, strict=True):
            axes.imshow(image.permute(1, 2, 0).numpy())
    for axes in grid.flat:
        axes.set_axis_off()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
