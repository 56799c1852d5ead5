"""Bias tuning: the backbone's biases and the head are trained."""

from __future__ import annotations

from torch import nn

from pcx.models import HEAD_INITS
from pcx.models.base import TunedModel
from pcx.models.parts import biases_of


class Bias(TunedModel):
    """Trains every bias of a copy of the backbone, and the head (BitFit; VPT paper, Sec. 4.1).

    Biases are the parameters whose names end in "bias", those of norms and of the patch embedding
    among them. Tables of relative positions are none. The backbone stays in eval mode.

    Args:
        backbone: a timm model, a vision model of Hugging Face, or a vision tower of open_clip.
        num_classes: size of a new head; None keeps the backbone's size, 0 removes the head.
        head_init: "trunc-normal" and "published" draw the head anew, "keep" starts from the
            backbone's own.

    Raises:
        ValueError: an argument is out of range, or the backbone has no biases.

    Example:
        >>> model = pcx.Bias(timm.create_model("vit_base_patch16_224"), num_classes=196)
        >>> pcx.fit(model, loader, epochs=100, lr=0.05)
    """

    method = "bias"

    def __init__(
        self, backbone: nn.Module, *, num_classes: int | None = None, head_init: str = HEAD_INITS[0]
    ):
        super().__init__(backbone, num_classes=num_classes, head_init=head_init)
        biases = biases_of(self.backbone)
        if not biases:
            raise ValueError(f"backbone: {self.spec.family} has no biases that could be trained")
        self.own(keep=biases.__contains__)
        self.train(backbone.training)
