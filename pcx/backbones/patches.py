"""The patch embedding, a convolution whose windows do not overlap, as a matrix product."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcx.backbones.residual import Wrapper
from pcx.ops.library import read_in


class PatchProduct(Wrapper):
    """Computes such a convolution as one matrix product over the patches.

    A convolution of three channels is far slower on a GPU: the library's kernels are made for more.

    Args:
        convolution: as `find_patch_projection` finds it; it keeps its weights.
    """

    holds = "convolution"
    convolution: Any

    @property
    def weight(self) -> Tensor:
        """The convolution's, whose dtype Hugging Face's models ask for."""
        return self.convolution.weight

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> patches [B, D, H / height, W / width], as the convolution.

        Raises:
            ValueError: the images are integers, or have another number of channels.
        """
        weight, bias = self.convolution.weight, self.convolution.bias
        if not images.is_floating_point():
            raise ValueError(
                f"images: {images.dtype}, expected floating-point numbers; scale and normalise "
                "them as the training transform does"
            )
        if images.dim() != 4 or images.shape[1] != self.convolution.in_channels:
            raise ValueError(
                f"images: shape {tuple(images.shape)}, expected "
                f"[B, {self.convolution.in_channels}, H, W]"
            )
        height, width = self.convolution.kernel_size
        down, across = images.shape[-2] // height, images.shape[-1] // width
        images = images[..., : down * height, : across * width]
        x = images.unflatten(3, (across, width)).unflatten(2, (down, height))
        x = x.permute(0, 2, 4, 1, 3, 5)  # [B, down, across, C, height, width]
        # One copy that also casts, where autocast would take a pass of its own.
        x = x.to(read_in(images, images.dtype), memory_format=torch.contiguous_format)
        return F.linear(x.flatten(3), weight.flatten(1), bias).permute(0, 3, 1, 2)


def find_patch_projection(backbone: nn.Module, patch_elements: int | None) -> str | None:
    """The dotted name of the convolution that makes tokens of patches; None where there is none.

    It is the only convolution of the backbone whose windows are the patches: its stride is its
    kernel's size, nothing is padded, and all channels are read at once.

    Args:
        backbone: any module.
        patch_elements: numbers in a patch, 3 * height * width.
    """
    found = [
        name
        for name, module in backbone.named_modules()
        if type(module) is nn.Conv2d
        and module.stride == module.kernel_size
        and module.padding in ((0, 0), "valid")
        and (module.dilation, module.groups) == ((1, 1), 1)
        and module.in_channels * math.prod(module.kernel_size) == patch_elements
    ]
    return found[0] if len(found) == 1 else None
