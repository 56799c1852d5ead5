"""Full fine-tuning: every weight is trained."""

from __future__ import annotations

from typing import Any

from timm.optim import param_groups_weight_decay
from torch import nn

from pcx.models import HEAD_INITS
from pcx.models.base import TunedModel


class Full(TunedModel):
    """Full fine-tuning of a copy of the backbone (VPT paper, Sec. 4.1).

    The given backbone is not written: the model trains and saves a copy of all its weights. The
    copy's dropout and drop path are on in training.

    Args:
        backbone: a timm model, a vision model of Hugging Face, or a vision tower of open_clip.
        num_classes: size of a new head; None keeps the backbone's size.
        head_init: "trunc-normal" and "published" draw the head anew, "keep" starts from the
            backbone's own.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> model = pcx.Full(timm.create_model("vit_base_patch16_224"), num_classes=196)
        >>> pcx.fit(model, loader, epochs=100, lr=0.001)
    """

    method = "full"
    backbone_mode = "train"

    def __init__(
        self, backbone: nn.Module, *, num_classes: int | None = None, head_init: str = HEAD_INITS[0]
    ):
        super().__init__(backbone, num_classes=num_classes, head_init=head_init)
        self.own()

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """As the backbone's library has it: position embeddings and the like do not decay."""
        spared: set[str] = getattr(self.backbone, "no_weight_decay", set)()
        names = [f"backbone.{name}" for name in spared]
        return param_groups_weight_decay(self, weight_decay, no_weight_decay_list=names)
