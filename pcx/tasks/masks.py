"""A procedural task of semantic segmentation: which shape each pixel belongs to.

Scenes have two to five objects of any shape and colour over a graded, noisy background. A pixel's
class is 0 for background, else 1 + the place of the topmost object's shape in `SHAPES`. Images and
masks are 64x64, rendered from known factors with a fixed seed per split.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from pcx.tasks.render import SHAPES, Objects, graded, render, render_shapes, uniform

NUM_CLASSES = 1 + len(SHAPES)
SPLITS = {"train": (21, 800), "val": (22, 200), "test": (23, 1000)}  # seed, size
FEWEST, MOST = 2, 5
SIZE = 64


def draw_masks() -> dict[str, tuple[Tensor, Tensor]]:
    """Images [N, 3, 64, 64] uint8 and masks [N, 64, 64] int64 of "train", "val" and "test"."""
    return {
        name: _scenes(size, torch.Generator().manual_seed(seed))
        for name, (seed, size) in SPLITS.items()
    }


def _scenes(size: int, generator: Generator) -> tuple[Tensor, Tensor]:
    count = torch.randint(FEWEST, MOST + 1, (size, 1), generator=generator)
    objects = Objects(
        shape=torch.randint(len(SHAPES), (size, MOST), generator=generator),
        x=uniform(generator, size, MOST, low=0.1, high=0.9),
        y=uniform(generator, size, MOST, low=0.1, high=0.9),
        radius=uniform(generator, size, MOST, low=0.10, high=0.24),
        angle=uniform(generator, size, MOST, high=2 * math.pi),
        colour=uniform(generator, size, MOST, 3),
        visible=torch.arange(MOST) < count,
    )
    background = graded(size, generator, SIZE)
    return render(objects, background, SIZE), render_shapes(objects, SIZE)
