"""Data sets of images with labels, from memory or from files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

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
        config: of the backbone, see `pcx.data.data_config`.
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
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: listed in the split, but there is no file") from None
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise ValueError(f"{path}: not a whole image file ({error})") from error
        return self.transform(image), label
