"""Classifier heads: their size and their initialisation."""

from __future__ import annotations

from typing import Any

HEAD_INITS = ("published", "keep")


def set_head_size(backbone: Any, num_classes: int) -> None:
    if not hasattr(backbone, "reset_classifier"):
        raise ValueError(
            "num_classes: only timm backbones can be given a new head; set the model's own"
        )
    backbone.reset_classifier(num_classes)
