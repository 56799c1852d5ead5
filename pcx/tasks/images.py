"""Data sets of images with labels, from memory or from files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base
from torch import Tensor
from torch.utils.data import Dataset

ORIENTATION = Base.Orientation


class MemoryImages(Dataset):
    """Images in memory, resized and normalised once for a backbone.

    Args:
        images: [N, 3, h, w] uint8.
        labels: [N] int64, or a class for every pixel [N, h, w] int64, of which the nearest is
            taken where images are resized.
        config: the image settings from `pcx.backbones.inputs.data_config`.
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
        if labels.dim() == 3 and labels.shape[-2:] != (height, width):
            resized = F.interpolate(labels[:, None].float(), (height, width), mode="nearest-exact")
            self.labels = resized[:, 0].long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int | Tensor]:
        label = self.labels[i]
        return self.images[i], label if label.dim() else int(label)


class FileImages(Dataset):
    """Image files with labels.

    Args:
        samples: (file, label) of each image.
        transform: function of a PIL image that returns a tensor.
        eval_transform: the same without augmentation; scoring reads images through it.
        classes: names of the classes in the order of the labels, where they are known.

    Raises:
        ValueError: a file that is read is not a whole image; the message names it.
    """

    def __init__(
        self,
        samples: Sequence[tuple[Path, int]],
        transform: Callable,
        eval_transform: Callable | None = None,
        classes: Sequence[str] | None = None,
    ):
        self.samples = list(samples)
        self.classes = None if classes is None else list(classes)
        self.transform = transform
        self.eval_transform = eval_transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        path, label = self.samples[i]
        return self.transform(opened(path, path)), label


class ReaderImages(Dataset):
    """Images of a timm reader; an image that cannot be read is an error.

    timm's own data set replaces such an image by the next one. The attributes `transform` and
    `eval_transform` are those of `FileImages`, None at first.

    Raises:
        ValueError: a file that is read is not a whole image; the message names it.
    """

    def __init__(self, reader: Any):
        self.reader = reader
        self.transform: Callable | None = None
        self.eval_transform: Callable | None = None

    @property
    def samples(self) -> Any:
        """(file, label) of each image, where the reader has them in a folder; None otherwise."""
        return getattr(self.reader, "samples", None)

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        file, label = self.reader[i][:2]
        with file if hasattr(file, "close") else nullcontext():
            image = opened(file, self.reader.filename(i))
        return (image if self.transform is None else self.transform(image)), label


def opened(file: Any, name: Any) -> Image.Image:
    try:
        with Image.open(file) as image:
            return as_rgb(upright(image))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{name}: listed in the split, but there is no file; add it, or take it off the list"
        ) from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: {error}; leave it out, or make it smaller") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{name}: not a whole image file ({error}); fetch it again") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF data says that the camera was held; others as they are."""
    if image.getexif().get(ORIENTATION, 1) == 1:
        return image
    return ImageOps.exif_transpose(image)


def as_rgb(image: Image.Image) -> Image.Image:
    """An image as 8-bit RGB.

    16 bits are scaled to 8. What is transparent shows white, not what lies under it.

    Raises:
        ValueError: its numbers have no range that is known.
    """
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"its pixels are of mode {image.mode!r}, {values.min()}..{values.max()}; convert "
                "it to 8 or 16 bits"
            )
        if image.mode != "I" or values.max() > 255:  # "I" may hold 8 bits as well
            values = (values / 257).round()
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        if np.asarray(layers)[..., 3].min() < 255:
            white = Image.new("RGBA", layers.size, "white")
            return Image.alpha_composite(white, layers).convert("RGB")
    return image.convert("RGB")
