"""Procedural tasks that ask the questions of three of VTAB's structured tasks.

| task  | question                              | classes     | VTAB's task          |
| ----- | ------------------------------------- | ----------- | -------------------- |
| count | how many objects there are, 3 to 10   | 8           | clevr-count          |
| ori   | the orientation of the object         | 16 (a turn) | dsprites-orientation |
| loc   | the horizontal position of the object | 16          | dsprites-location    |

A square or an ellipse looks alike at several angles, in dSprites too, so no model can reach 100% on
"ori". Images are 64x64 and rendered from known factors with a fixed seed per split. There are 1000
training images as in VTAB-1k (800 train, 200 val).
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from pcx.tasks.render import SHAPES, Objects, render, uniform

NUM_CLASSES = {"count": 8, "ori": 16, "loc": 16}
SPLITS = {"train": (11, 800), "val": (12, 200), "test": (13, 2000)}  # seed, size
FEWEST, MOST = 3, 10
_DSPRITES = [SHAPES.index(name) for name in ("square", "ellipse", "heart")]


def draw_sprites(question: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Images [N, 3, 64, 64] uint8 and labels [N] of "train", "val" and "test".

    Args:
        question: "count", "ori" or "loc".
    """
    splits = {}
    for name, (seed, size) in SPLITS.items():
        generator = torch.Generator().manual_seed(seed)
        if question == "count":
            splits[name] = _count(size, generator)
        else:
            images, labels = _single(size, generator)
            splits[name] = images, labels[question]
    return splits


def _single(size: int, generator: Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """One white shape on black, with the steps of dSprites in scale, angle and position."""
    shape = torch.tensor(_DSPRITES)[torch.randint(3, (size, 1), generator=generator)]
    scale = torch.randint(6, (size, 1), generator=generator) / 5  # 6 scales
    turn = torch.randint(40, (size, 1), generator=generator)  # 40 angles
    x, y = (torch.randint(32, (size, 1), generator=generator) for _ in range(2))  # 32 x 32 places
    objects = Objects(
        shape=shape,
        x=0.2 + 0.6 * x / 31,
        y=0.2 + 0.6 * y / 31,
        radius=0.09 + 0.09 * scale,
        angle=2 * math.pi * turn / 40,
        colour=torch.ones(size, 1, 3),
        visible=torch.ones(size, 1, dtype=torch.bool),
    )
    labels = {"ori": (turn[:, 0] * 16) // 40, "loc": x[:, 0] // 2}
    return render(objects, torch.zeros(1, 3, 1, 1)), labels


def _count(size: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Coloured shapes over grey, on a jittered grid so that none hides another."""
    count = torch.randint(FEWEST, MOST + 1, (size,), generator=generator)
    cells = torch.stack([torch.randperm(16, generator=generator)[:MOST] for _ in range(size)])
    jitter = uniform(generator, 2, size, MOST, low=-0.04, high=0.04)
    objects = Objects(
        shape=torch.randint(len(SHAPES), (size, MOST), generator=generator),
        x=(cells % 4 + 0.5) / 4 + jitter[0],
        y=(cells // 4 + 0.5) / 4 + jitter[1],
        radius=uniform(generator, size, MOST, low=0.05, high=0.1),
        angle=uniform(generator, size, MOST, high=2 * math.pi),
        colour=uniform(generator, size, MOST, 3, low=0.1),
        visible=torch.arange(MOST) < count[:, None],
    )
    grey = uniform(generator, size, 1, 1, 1, low=0.3, high=0.6).expand(-1, 3, -1, -1)
    return render(objects, grey), count - FEWEST
