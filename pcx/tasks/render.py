"""Draws scenes of flat shapes with known factors, many at a time, on any device.

All procedural tasks and the upstream task of the embedded backbone use this one function. They
differ in the factors that they vary and ask for, not in how a shape looks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

SHAPES = ("disc", "square", "triangle", "star", "cross", "ring", "heart", "ellipse")


@dataclass
class Objects:
    """The factors of K objects in each of B scenes; the last object lies on top.

    Lengths are fractions of the image's side, angles are radians, colours lie in [0, 1].
    """

    shape: Tensor  # [B, K] int64, index into SHAPES
    x: Tensor  # [B, K] centre, 0 left, 1 right
    y: Tensor  # [B, K] centre, 0 top, 1 bottom
    radius: Tensor  # [B, K]
    angle: Tensor  # [B, K]
    colour: Tensor  # [B, K, 3]
    visible: Tensor  # [B, K] bool


def uniform(generator: Generator, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Numbers between two bounds, on the generator's device."""
    return low + (high - low) * torch.rand(*shape, generator=generator, device=generator.device)


def graded(batch: int, generator: Generator, size: int, brightest: float = 1.0) -> Tensor:
    """Backgrounds [B, 3, size, size]: a colour that changes along both axes, and noise."""
    device = generator.device
    ramp = torch.linspace(-0.5, 0.5, size, device=device)
    return (
        uniform(generator, batch, 3, 1, 1, high=brightest)
        + uniform(generator, batch, 3, 1, 1, low=-0.3, high=0.3) * ramp[:, None]
        + uniform(generator, batch, 3, 1, 1, low=-0.3, high=0.3) * ramp
        + 0.05 * torch.randn(batch, 3, size, size, generator=generator, device=device)
    )


def render(objects: Objects, background: Tensor, size: int = 64) -> Tensor:
    """Draws the objects over a background.

    Args:
        objects: the factors of every object.
        background: [B, 3, size, size] or broadcastable to it, values in [0, 1].
        size: side of the square images in pixels.

    Returns:
        Images [B, 3, size, size], uint8.
    """
    batch = len(objects.x)
    image = background.to(objects.x.device).expand(batch, 3, size, size).clone()
    for k, cover in enumerate(_covers(objects, size)):
        image = torch.lerp(image, objects.colour[:, k, :, None, None], cover[:, None])
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def render_shapes(objects: Objects, size: int = 64) -> Tensor:
    """The shape that each pixel shows: [B, size, size] int64, 0 for none, else 1 + its place.

    A pixel belongs to the topmost object that covers at least half of it.

    Args:
        objects: the factors of every object.
        size: side of the square images in pixels.
    """
    found = torch.zeros(len(objects.x), size, size, dtype=torch.int64, device=objects.x.device)
    for k, cover in enumerate(_covers(objects, size)):
        found = torch.where(cover >= 0.5, 1 + objects.shape[:, k, None, None], found)
    return found


def _covers(objects: Objects, size: int) -> Iterator[Tensor]:
    """The share of every pixel that each object covers, [B, size, size] in 0..1, one by one."""
    centres = (torch.arange(size, device=objects.x.device) + 0.5) / size
    ys, xs = torch.meshgrid(centres, centres, indexing="ij")  # [size, size] each
    for k in range(objects.x.shape[1]):
        radius = objects.radius[:, k, None, None]
        u, v = _local(
            xs - objects.x[:, k, None, None],
            ys - objects.y[:, k, None, None],
            objects.angle[:, k, None, None],
            radius,
        )
        distance = _distance(objects.shape[:, k], u, v) * radius * size  # roughly in pixels
        yield (0.5 - distance).clamp(0, 1) * objects.visible[:, k, None, None]


def _local(dx: Tensor, dy: Tensor, angle: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = angle.cos(), angle.sin()
    return (cos * dx + sin * dy) / radius, (cos * dy - sin * dx) / radius


def _distance(shape: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Signed distance to the outline, negative inside, in units of the radius; [B, size, size]."""
    out = torch.empty_like(u)
    for index, name in enumerate(SHAPES):
        rows = shape == index
        if rows.any():
            out[rows] = _OUTLINES[name](u[rows], v[rows])
    return out


def _ngon(u: Tensor, v: Tensor, sides: int, apothem: float) -> Tensor:
    angles = [2 * math.pi * i / sides + math.pi / 2 for i in range(sides)]
    return torch.stack([u * math.cos(a) + v * math.sin(a) for a in angles]).amax(0) - apothem


def _star(u: Tensor, v: Tensor) -> Tensor:
    return torch.hypot(u, v) - (0.68 + 0.32 * torch.cos(5 * torch.atan2(v, u)))


def _cross(u: Tensor, v: Tensor) -> Tensor:
    a, b = u.abs(), v.abs()
    return torch.minimum(
        torch.maximum(a - 0.95, b - 0.3),
        torch.maximum(a - 0.3, b - 0.95),
    )


def _heart(u: Tensor, v: Tensor) -> Tensor:
    a = u.abs()
    lobes = torch.hypot(a - 0.42, v + 0.3) - 0.5
    tip = torch.maximum((a + v) * math.sqrt(0.5) - 0.585, 0.05 - v)
    middle = torch.maximum(a - 0.6, (v + 0.12).abs() - 0.18)
    return torch.minimum(torch.minimum(lobes, tip), middle)


_OUTLINES = {
    "disc": lambda u, v: torch.hypot(u, v) - 0.9,
    "square": lambda u, v: torch.maximum(u.abs(), v.abs()) - 0.75,
    "triangle": lambda u, v: _ngon(u, v, 3, 0.5),
    "star": _star,
    "cross": _cross,
    "ring": lambda u, v: (torch.hypot(u, v) - 0.7).abs() - 0.22,
    "heart": _heart,
    "ellipse": lambda u, v: (torch.hypot(u, 2 * v) - 1.0) * 0.6,
}
