"""Partial tuning: the last blocks and the head are trained."""

from __future__ import annotations

from typing import Any

from torch import nn

from pcx.arguments import whole_number
from pcx.models import HEAD_INITS
from pcx.models.base import TunedModel


class Partial(TunedModel):
    """Trains the last k blocks, the norm behind them, and the head (VPT paper, Sec. 4.1).

    The blocks are trained in a copy, and stay in eval mode as the rest of the backbone does.

    Args:
        backbone: a vision transformer of timm, Hugging Face or open_clip, also a hierarchical one.
        num_layers: k, the blocks that are trained.
        num_classes: size of a new head; None keeps the backbone's size, 0 removes the head.
        head_init: "trunc-normal" and "published" draw the head anew, "keep" starts from the
            backbone's own.

    Raises:
        ValueError: an argument is out of range, or the backbone has no blocks of attention.

    Example:
        >>> model = pcx.Partial(timm.create_model("vit_base_patch16_224"), 2, num_classes=196)
        >>> pcx.fit(model, loader, epochs=100, lr=0.01)
    """

    method = "partial"

    def __init__(
        self,
        backbone: nn.Module,
        num_layers: int = 1,
        *,
        num_classes: int | None = None,
        head_init: str = HEAD_INITS[0],
    ):
        num_layers = whole_number("num_layers", num_layers, 1)
        super().__init__(backbone, num_classes=num_classes, head_init=head_init)
        depth = len(self.spec.blocks)
        if num_layers > depth:
            why = f": {self.spec.no_blocks}" if self.spec.no_blocks else ""
            raise ValueError(
                f"num_layers: {num_layers}, and {self.spec.family} has {depth} blocks{why}"
            )
        self.num_layers = num_layers
        for block in self.spec.blocks[-num_layers:]:
            self.own(block.name)
        if self.spec.norm is not None and list(
            self.backbone.get_submodule(self.spec.norm).parameters()
        ):
            self.own(self.spec.norm)
        self.train(backbone.training)

    def config(self) -> dict[str, Any]:
        """What `from_config` needs besides the backbone and the weights, as JSON."""
        return {**super().config(), "num_layers": self.num_layers}
