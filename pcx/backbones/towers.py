"""Vision towers: models without a classifier, and a head of ours behind them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pcx.backbones import hugging_face
from pcx.backbones.inputs import input_size
from pcx.backbones.outputs import pooled_features
from pcx.backbones.probing import hollow
from pcx.backbones.spec import library_facts


class Tower(nn.Module):
    """A model that gives features of images, and a linear layer that reads them.

    Args:
        tower: a vision model of Hugging Face without a classifier, or any module that gives
            features [B, D]; it is taken in as it is.
        num_classes: of the linear layer; 0 for none.

    Attributes:
        tower: the model.
        classifier: the linear layer, an identity where there is none. No tower has a part of that
            name, by which peft finds it.
        has_cls: whether the model's first token is [CLS].
    """

    base_model_prefix = ""  # what transformers, asked by peft, reads of a model with a config

    def __init__(self, tower: nn.Module, num_classes: int):
        super().__init__()
        self.has_cls: bool = library_facts(tower)["has_cls"]
        self.tower = tower
        self.classifier: nn.Module = nn.Identity()
        self.width = _width(self)
        if num_classes:
            self.classifier = nn.Linear(self.width, num_classes)

    @property
    def config(self) -> Any:
        """The tower's own configuration, None where it has none."""
        return getattr(self.tower, "config", None)

    @property
    def image_size(self) -> Any:
        """What the tower says of the size of its images, None where it says nothing."""
        return getattr(self.tower, "image_size", None)

    def forward(self, x: Tensor, **inputs: Any) -> Tensor:
        """Images [B, C, H, W] -> logits [B, num_classes], or features [B, D]."""
        return self.classifier(pooled_features(self.tower(x, **inputs), self.has_cls))

    def facts(self) -> dict[str, Any]:
        """Fields of a `BackboneSpec`: those of the tower, and the head's."""
        facts = library_facts(self.tower)
        return {
            **facts,
            "family": type(self.tower).__name__,
            "heads": ("classifier",) if isinstance(self.classifier, nn.Linear) else (),
            "listed": tuple(f"tower.{name}" for name in facts["listed"]),
            "dim": self.width,
        }


def facts_of(backbone: Any) -> dict[str, Any]:
    """Fields of a `BackboneSpec` of a transformer with a head of ours: it tells them itself."""
    return backbone.facts()


def with_head(backbone: Any, num_classes: int | None) -> Any:
    """Gives a backbone a new head, or none.

    timm's models have a function for it. Of other libraries the linear layers that their facts name
    are exchanged, and a model without a classifier gets a linear layer behind its features.

    Args:
        backbone: a model's own copy of one; changed.
        num_classes: of the new head, 0 for none; None leaves a head as it is.

    Returns:
        The backbone, or a `Tower` around it.

    Raises:
        ValueError: the library's facts of the backbone cannot be found.
    """
    if num_classes is None and not hugging_face.is_tower(backbone):
        return backbone
    if hasattr(backbone, "reset_classifier"):
        backbone.reset_classifier(num_classes)
        return backbone
    heads = library_facts(backbone)["heads"]
    if not heads and not isinstance(backbone, Tower):
        hugging_face.leave_out_drawn_pooler(backbone)
        return Tower(backbone, num_classes or 0)
    for name in heads or ("classifier",):
        old = backbone.get_submodule(name)
        width = getattr(old, "in_features", None) or backbone.width
        new = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        backbone.set_submodule(name, new)
    hugging_face.tell_size(backbone, num_classes)
    return backbone


@torch.no_grad()
def _width(tower: Tower) -> int:
    """How many features a tower gives of an image, found on shapes alone."""
    model = hollow(tower)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    try:
        found = model(torch.empty(1, *input_size(model), device="meta", dtype=dtype))
    except Exception as error:  # a model may fail in any way
        raise ValueError(
            f"backbone: {type(tower.tower).__name__} gives no features of images [B, C, H, W]: "
            f"its forward failed on one without values ({error})"
        ) from error
    if found.dim() != 2:
        raise ValueError(
            f"backbone: {type(tower.tower).__name__} gave {list(found.shape)} for one image, "
            "expected features [1, D]; give a model that pools its tokens"
        )
    return found.shape[-1]
