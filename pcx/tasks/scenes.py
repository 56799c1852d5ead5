"""The upstream task of the embedded backbone: the shape and colour of the main object.

A scene has one large object among small ones over a graded, noisy background. The label is
shape x colour. The downstream tasks (digits, counting, orientation, location) ask for factors that
this task ignores.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from pcx.tasks.render import SHAPES, Objects, graded, render, uniform

COLOURS = torch.tensor(
    [
        [0.90, 0.15, 0.15],
        [0.15, 0.75, 0.20],
        [0.20, 0.30, 0.95],
        [0.95, 0.85, 0.15],
        [0.15, 0.85, 0.90],
        [0.85, 0.20, 0.85],
        [0.95, 0.55, 0.10],
        [0.95, 0.95, 0.95],
    ]
)
NUM_CLASSES = len(SHAPES) * len(COLOURS)
CLUTTER = 8


def scenes(batch: int, generator: Generator, size: int = 64) -> tuple[Tensor, Tensor]:
    """Draws a batch of cluttered scenes.

    Args:
        batch: number of scenes.
        generator: source of all randomness; the scenes are drawn on its device.
        size: side in pixels.

    Returns:
        Images [batch, 3, size, size], uint8, and labels [batch] in 0..63, shape * 8 + colour.
    """
    device = generator.device

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, device=device)

    count = CLUTTER + 1
    shape, colour = integers(len(SHAPES), batch, count), integers(len(COLOURS), batch, count)
    radius = uniform(generator, batch, count, low=0.04, high=0.10)
    radius[:, -1] = uniform(generator, batch, low=0.16, high=0.34)
    x, y = uniform(generator, batch, count), uniform(generator, batch, count)
    for centre in (x, y):  # the main object stays inside the image
        centre[:, -1] = radius[:, -1] + centre[:, -1] * (1 - 2 * radius[:, -1])
    visible = uniform(generator, batch, count) < uniform(generator, batch, 1)
    visible[:, -1] = True
    shade = COLOURS.to(device)[colour] * uniform(
        generator, batch, count, 1, low=0.75
    ) + 0.08 * torch.randn(batch, count, 3, generator=generator, device=device)
    objects = Objects(
        shape=shape,
        x=x,
        y=y,
        radius=radius,
        angle=uniform(generator, batch, count, high=2 * math.pi),
        colour=shade.clamp(0, 1),
        visible=visible,
    )
    background = graded(batch, generator, size, brightest=0.7)
    return render(objects, background, size), shape[:, -1] * len(COLOURS) + colour[:, -1]
