"""Data sets of images with labels, from memory or from files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset


class MemoryImages(Dataset):
    """Images in memory, resized and normalised once as a backbone expects them.

    Args:
        images: [N, 3, h, w] uint8.
        labels: [N] int64.
        config: of the backbone, see `pcx.backbones.inputs.data_config`.
    """

    def __init__(self, images: Tensor, labels: Tensor, config: dict):
        _, height, width = config["input_size"]
        pixels = images.float() / 255
        if images.shape[-2:] != (height, width):
            pixels = F.interpolate(
                pixels, (height, width), mode="bilinear", antialias=True, align_corners=False
            )
        mean, std = (torch.tensor(config[k])[:, None, None] for k in ("mean", "std"))
        self.images = (pixels - mean) / std
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.images[i], int(self.labels[i])


class FileImages(Dataset):
    """Image files with labels.

    Args:
        samples: (file, label) of each.
        transform: PIL image -> tensor.
        eval_transform: the transform without augmentation, which scoring reads through.

    Raises:
        ValueError: on reading a file that is no whole image; names it.
    """

    def __init__(
        self,
        samples: Sequence[tuple[Path, int]],
        transform: Callable,
        eval_transform: Callable | None = None,
    ):
        self.samples = list(samples)
        self.transform = transform
        self.eval_transform = eval_transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        path, label = self.samples[i]
        return self.transform(_opened(path, path)), label


class ReaderImages(Dataset):
    """The images that a timm reader gives; `transform` and `eval_transform` as in `FileImages`.

    timm's own data set replaces an image that it cannot read by the next one.

    Raises:
        ValueError: on reading a file that is no whole image; names it.
    """

    def __init__(self, reader: Any):
        self.reader = reader
        self.transform: Callable | None = None
        self.eval_transform: Callable | None = None

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        file, label = self.reader[i][:2]
        with file if hasattr(file, "close") else nullcontext():
            image = _opened(file, self.reader.filename(i))
        return (image if self.transform is None else self.transform(image)), label


def _opened(file: Any, name: Any) -> Image.Image:
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: listed in the split, but there is no file") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{name}: not a whole image file ({error})") from error
