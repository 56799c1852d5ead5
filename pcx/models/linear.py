"""Linear probing: the head alone is trained."""

from __future__ import annotations

from pcx.models.base import TunedModel


class Linear(TunedModel):
    """A linear probe: the backbone is frozen and the head is trained (VPT paper, Sec. 4.1).

    Args:
        backbone: a timm model, a vision model of Hugging Face, or a vision tower of open_clip.
        num_classes: size of a new head; None keeps the backbone's size.
        head_init: "trunc-normal" and "published" draw the head anew, "keep" starts from the
            backbone's own.

    Raises:
        ValueError: an argument is out of range, or the backbone has no head.

    Example:
        >>> model = pcx.Linear(timm.create_model("vit_base_patch16_224"), num_classes=196)
        >>> pcx.fit(model, loader, epochs=100, lr=0.1)
    """

    method = "linear"
