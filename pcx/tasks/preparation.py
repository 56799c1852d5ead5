"""The part of a transform that gives the same pixels on each read, and the rest of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL
import timm
import torch
import torchvision
from PIL import Image
from timm.data.transforms import CenterCropOrPad, MaybeToTensor, ResizeKeepRatio
from torch import nn
from torchvision import transforms
from torchvision.transforms import v2

# Goes up when files are read otherwise: 2 scales 16 bits and shows white through, 3 turns images.
OPENED = 3
RATIO = 4  # of the longest side to the shortest: longer images of a Resize(int) are not kept
_RESIZES = (transforms.Resize, v2.Resize)
_CROPS = (transforms.CenterCrop, v2.CenterCrop, CenterCropOrPad)
_TO_TENSOR = (transforms.ToTensor, MaybeToTensor)
_RESIZE = ("size", "interpolation", "max_size", "antialias")
_KNOWN: dict[type, tuple[str, ...]] = {  # what decides the pixels of each
    transforms.Resize: _RESIZE,
    v2.Resize: _RESIZE,
    transforms.CenterCrop: ("size",),
    v2.CenterCrop: ("size",),
    CenterCropOrPad: ("size", "fill", "padding_mode"),
    ResizeKeepRatio: ("size", "interpolation", "longest"),
}


@dataclass(frozen=True)
class Preparation:
    """A transform in two parts: one gives the same pixels on each read, the other runs on them.

    Attributes:
        fixed: functions of a PIL image that return one; they draw no random numbers. They are
            copies, so that the description stays true where a transform is changed in place.
        rest: functions that follow, up to the transform's result.
        as_tensor: the first of them makes a tensor, which is made from the kept pixels directly.
        limit: bytes of the largest image that is kept.
        description: JSON of what decides the pixels: the fixed part, and versions of libraries.
    """

    fixed: tuple[Callable, ...]
    rest: tuple[Callable, ...]
    as_tensor: bool
    limit: int
    description: str

    def pixels_of(self, image: Image.Image) -> np.ndarray | None:
        """The pixels to keep of a prepared image; None where it is not RGB.

        Returns:
            uint8 [3, H, W] where the rest begins by making a tensor, [H, W, 3] otherwise.
        """
        if not isinstance(image, Image.Image) or image.mode != "RGB":
            return None
        pixels = np.asarray(image)  # [H, W, 3]
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)) if self.as_tensor else pixels

    def finished(self, pixels: np.ndarray) -> Any:
        """The transform's result from pixels that `pixels_of` gave, to the same bits."""
        if not self.as_tensor:
            return applied(self.rest, Image.fromarray(pixels))
        image = torch.from_numpy(pixels).to(torch.get_default_dtype()).div_(255)  # as ToTensor
        return applied(self.rest[1:], image)


def applied(parts: Iterable[Callable], image: Any) -> Any:
    """Runs functions one after the other."""
    for part in parts:
        image = part(image)
    return image


def preparation_of(transform: Any) -> Preparation | str:
    """Divides a transform behind its longest part whose pixels can be kept.

    The fixed part consists of resizes and centre crops of torchvision and timm, and ends with a
    part that bounds the size of the image. Everything behind it runs on each read.

    Returns:
        The division, or the reason why there is none.
    """
    if transform is None:
        return "it has no transform, so that its images have no size of their own"
    parts = _flat(transform)
    known, limit = 0, 0
    for count, part in enumerate(parts, 1):
        if not _is_fixed(part):
            break
        bound = _limit(part)
        if bound:
            known, limit = count, bound
    if not known:
        return (
            f"its transform begins with {type(parts[0]).__name__ if parts else 'nothing'}, and "
            "only resizes and centre crops to a size give the same pixels on each read"
        )
    fixed, rest = tuple(copy.deepcopy(parts[:known])), tuple(parts[known:])
    as_tensor = bool(rest) and type(rest[0]) in _TO_TENSOR
    description = {
        "fixed": [[type(part).__name__, *map(repr, _settings(part))] for part in fixed],
        "layout": "CHW" if as_tensor else "HWC",
        "limit": limit,
        "opened": OPENED,
        "pillow": PIL.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
    }
    return Preparation(fixed, rest, as_tensor, limit, json.dumps(description))


def _flat(transform: Any) -> list[Any]:
    """The parts of a transform, those of transforms within it too."""
    if type(transform) in (transforms.Compose, v2.Compose):
        return [part for inner in transform.transforms for part in _flat(inner)]
    if type(transform) is nn.Sequential:
        return [part for inner in transform for part in _flat(inner)]
    return [transform]


def _settings(part: Any) -> list[Any]:
    return [getattr(part, name) for name in _KNOWN[type(part)]]


def _is_fixed(part: Any) -> bool:
    if type(part) is ResizeKeepRatio:
        drawn = part.random_scale_prob or part.random_aspect_prob
        return not drawn and not isinstance(part.interpolation, list | tuple)
    return type(part) in _KNOWN


def _limit(part: Any) -> int:
    """Bytes of the largest image that a part gives and that is kept; 0 where nothing bounds it."""
    if type(part) not in (*_RESIZES, *_CROPS):
        return 0
    sides = list(part.size) if isinstance(part.size, list | tuple) else [part.size]
    if len(sides) == 2:
        return 3 * sides[0] * sides[1]
    if sides[0] is None:  # v2's Resize to a longest side
        return 3 * part.max_size**2
    if type(part) in _CROPS:
        return 3 * sides[0] ** 2
    return 3 * sides[0] * (part.max_size or RATIO * sides[0])
