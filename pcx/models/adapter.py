"""Adapters: a small MLP of their own behind each block's MLP."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pcx.arguments import whole_number
from pcx.backbones.residual import OnOutput, wrap
from pcx.models import HEAD_INITS
from pcx.models.base import TunedModel, check_choice
from pcx.models.heads import trained_dtype
from pcx.ops.library import autocast_dtype

INITS = ("zero-up", "published")


class Adapter(TunedModel):
    """Adds x + up(GELU(down(x))) behind the MLP of each block (Pfeiffer; VPT paper, Sec. 4.1).

    Args:
        backbone: a vision transformer of timm, Hugging Face or open_clip, also a hierarchical one.
        reduction: width of the block over that of the adapter's middle; the VPT paper has 8, 64
            and 256. SCT's paper calls 8 the width itself: reduction 96 of a ViT-B.
        init: "zero-up" starts with up at zero and down drawn (kaiming-uniform, as nn.Linear), so
            that the adapter does nothing at first. "published" starts both at zero, as the VPT
            paper's code does: then no gradient reaches any of its numbers but up's bias.
        num_classes: size of a new head; None keeps the backbone's size, 0 removes the head.
        head_init: "trunc-normal" and "published" draw the head anew, "keep" starts from the
            backbone's own.

    Attributes:
        adapters: of each block, with its `down` and `up`.

    Raises:
        ValueError: an argument is out of range, or a block has no MLP that is a module of its own.

    Example:
        >>> model = pcx.Adapter(timm.create_model("vit_base_patch16_224"), 64, num_classes=196)
        >>> pcx.fit(model, loader, epochs=100, lr=0.05)
    """

    method = "adapter"

    def __init__(
        self,
        backbone: nn.Module,
        reduction: int = 8,
        *,
        init: str = INITS[0],
        num_classes: int | None = None,
        head_init: str = HEAD_INITS[0],
    ):
        reduction = whole_number("reduction", reduction, 1)
        check_choice("init", init, INITS)
        super().__init__(backbone, num_classes=num_classes, head_init=head_init)
        self.reduction, self.init = reduction, init
        narrow = [block for block in self.spec.blocks if block.dim < reduction]
        if narrow:
            raise ValueError(
                f"reduction: {reduction}, and {narrow[0].name} has a width of {narrow[0].dim}; "
                "give at most that"
            )
        like = next(self.backbone.parameters())
        self.adapters = nn.ModuleList(
            Bottleneck(block.dim, block.dim // reduction, init, like) for block in self.spec.blocks
        )
        for block, adapter in zip(self.spec.blocks, self.adapters, strict=True):
            wrap(self.backbone, block, "mlp", lambda inner, a=adapter: OnOutput(inner, a))
        self.train(backbone.training)

    def _check_fits(self) -> None:
        if not self.spec.blocks:
            raise ValueError(
                f"backbone: {self.spec.family} has no blocks that could have adapters: "
                f"{self.spec.no_blocks}"
            )

    def config(self) -> dict[str, Any]:
        """What `from_config` needs besides the backbone and the weights, as JSON."""
        return {**super().config(), "reduction": self.reduction, "init": self.init}

    def deployed(self) -> nn.Module:
        """A backbone for inference alone, which has the adapters in it."""
        copied = self.copy().eval().requires_grad_(False)
        for block in self.spec.blocks:
            copied.backbone.get_submodule(block.mlp).take_in()
        return copied.backbone


class Bottleneck(nn.Module):
    """x + up(GELU(down(x))), x of [..., D].

    Args:
        dim: D.
        hidden: width of the middle.
        init: one of `INITS`.
        like: a weight of the backbone, for device and dtype; the adapter is float32 over 16 bits.
    """

    def __init__(self, dim: int, hidden: int, init: str, like: Tensor):
        super().__init__()
        options: dict[str, Any] = {"device": like.device, "dtype": trained_dtype(like.dtype)}
        self.down = nn.Linear(dim, hidden, **options)
        self.up = nn.Linear(hidden, dim, **options)
        zeros = [self.up.weight, self.up.bias]
        if init == "published":
            zeros += [self.down.weight, self.down.bias]
        for parameter in zeros:
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] in the dtype of x."""
        given = x if autocast_dtype(x.device.type) else x.to(self.down.weight.dtype)
        return x + self.up(F.gelu(self.down(given))).to(x.dtype)
