"""Prompts of a ConvNet: a learned border of pixels around the image."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcx.arguments import whole_number
from pcx.backbones.inputs import data_config, input_size
from pcx.backbones.probing import hollow
from pcx.backbones.residual import Wrapper
from pcx.models import HEAD_INITS
from pcx.models.base import TunedModel
from pcx.models.heads import trained_dtype

WIDTH = 5  # of the paper's 1, 3, 5, 7, 9 and 11


class Border(TunedModel):
    """Learned pixels around every image, for ConvNets (VPT paper, Sec. 4.4 and App. A).

    The border is the same for all images. It starts as uniform colours between black and white.
    The image becomes larger by it, which ConvNets take; a backbone that takes one size of images
    alone gets a smaller image within the border by `inside`.

    Args:
        backbone: a timm model, such as a ResNet or a ConvNeXt, a vision model of Hugging Face, or a
            vision tower of open_clip.
        width: of the border on each side, in pixels; the paper searches 1, 3, 5, 7, 9 and 11.
        inside: whether the image is shrunk, so that it has its size with the border.
        num_classes: size of a new head; None keeps the backbone's size, 0 removes the head.
        head_init: "trunc-normal" and "published" draw the head anew, "keep" starts from the
            backbone's own.

    Raises:
        ValueError: an argument is out of range, or the backbone does not take images of the larger
            size.

    Example:
        >>> model = pcx.Border(timm.create_model("resnet50"), width=5, num_classes=196)
        >>> pcx.fit(model, loader, epochs=100, lr=0.1)
    """

    method = "border"

    def __init__(
        self,
        backbone: nn.Module,
        width: int = WIDTH,
        *,
        inside: bool = False,
        num_classes: int | None = None,
        head_init: str = HEAD_INITS[0],
    ):
        width = whole_number("width", width, 1)
        if not isinstance(inside, bool):
            raise ValueError(f"inside: {inside!r}, expected True or False")
        super().__init__(backbone, num_classes=num_classes, head_init=head_init)
        _, rows, columns = input_size(self.backbone)
        if inside and 2 * width >= min(rows, columns):
            raise ValueError(
                f"width: {width} on both sides leaves nothing of an image of {rows} x {columns}; "
                f"give less than {(min(rows, columns) + 1) // 2}"
            )
        if not inside:
            _check_takes(self.backbone, width)
        self.backbone = Bordered(self.backbone, width, inside, self.spec.reads_map)
        self.own("border_rows")
        self.own("border_columns")
        self.train(backbone.training)

    @property
    def width(self) -> int:
        """Pixels on each side."""
        return self.backbone.width

    def plain_backbone(self) -> Any:
        """The backbone, which gets images with their border."""
        return self.backbone.inner if isinstance(self.backbone, Bordered) else self.backbone

    def features(self, x: Tensor, *args: Any, **kwargs: Any) -> list[Tensor]:
        """As `TunedModel.features`, of images [B, 3, H, W] with their border."""
        return super().features(self.backbone.bordered(x), *args, **kwargs)

    def config(self) -> dict[str, Any]:
        """What `from_config` needs besides the backbone and the weights, as JSON."""
        return {**super().config(), "width": self.width, "inside": self.backbone.inside}


class Bordered(Wrapper):
    """A backbone whose images get a border.

    Args:
        inner: the backbone.
        width: of the border on each side, in pixels.
        inside: whether the image is shrunk to make room for it.
        of_pixels: whether the backbone gives a map [B, C, H, W] of its images.
    """

    def __init__(self, inner: nn.Module, width: int, inside: bool, of_pixels: bool = False):
        super().__init__(inner)
        self.of_pixels = of_pixels
        channels, rows, columns = input_size(inner)
        self.width, self.inside, self.size = width, inside, (rows, columns)
        if inside:
            rows, columns = rows - 2 * width, columns - 2 * width
        self.image = (rows, columns)
        like, config = next(inner.parameters()), data_config(inner)
        options: dict[str, Any] = {"device": like.device, "dtype": trained_dtype(like.dtype)}
        mean, std = (torch.tensor(config[n], **options).view(-1, 1, 1) for n in ("mean", "std"))
        self.border_rows, self.border_columns = (  # above and below; left and right
            nn.Parameter((torch.rand(2, channels, *shape, **options) - mean) / std)
            for shape in ((width, columns + 2 * width), (rows, width))
        )

    def forward(self, x: Tensor, *args: Any, **inputs: Any) -> Any:
        """What the backbone gives for images [B, C, H, W] with the border.

        A map of pixels is cut to those of the image.
        """
        found = self.inner(self.bordered(x), *args, **inputs)
        if not self.of_pixels:
            return found
        w = self.width
        found = found[..., w:-w, w:-w]
        return F.interpolate(found, self.size, mode="bilinear") if self.inside else found

    def bordered(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] with the border around them.

        Raises:
            ValueError: the images are of another size than the border was made for.
        """
        if tuple(x.shape[-2:]) != self.size:
            raise ValueError(
                f"x: images of {x.shape[-2]} x {x.shape[-1]}, and the border is for images of "
                f"{self.size[0]} x {self.size[1]}; give these"
            )
        if self.inside:
            wide = x.to(trained_dtype(x.dtype))  # CPUs cannot resize 16 bits
            x = F.interpolate(wide, self.image, mode="bilinear", antialias=True).to(x.dtype)
        rows, columns = (
            t.to(x.dtype)[:, None].expand(-1, len(x), -1, -1, -1)
            for t in (self.border_rows, self.border_columns)
        )
        x = torch.cat([columns[0], x, columns[1]], -1)
        return torch.cat([rows[0], x, rows[1]], -2)


def _check_takes(backbone: nn.Module, width: int) -> None:
    """Raises a ValueError where a backbone does not take images that a border made larger."""
    channels, rows, columns = input_size(backbone)
    copied = hollow(backbone)
    dtype = next(p.dtype for p in copied.parameters() if p.is_floating_point())
    size = (1, channels, rows + 2 * width, columns + 2 * width)
    try:
        copied(torch.empty(size, device="meta", dtype=dtype))
    except Exception as error:  # a model may refuse another size in any way
        raise ValueError(
            f"backbone: {type(backbone).__name__} does not take images of {size[2]} x {size[3]} "
            f"({error}); give inside=True, or build it for images of any size"
        ) from error
