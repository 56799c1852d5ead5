"""Parts of a backbone that several methods train in copies of their own."""

from __future__ import annotations

from torch import nn

from pcx.backbones.residual import plain_names
from pcx.backbones.spec import BackboneSpec

_CLS = ("cls_token", "class_embedding", "class_token")  # timm's and Hugging Face's, open_clip's


def biases_of(backbone: nn.Module) -> set[str]:
    """Dotted names, without wrappers, of the biases: parameters whose names end in "bias".

    Tables of relative positions are none.
    """
    plain = plain_names(backbone)
    return {plain[name] for name, _ in backbone.named_parameters() if name.endswith("bias")}


def cls_token_of(backbone: nn.Module, spec: BackboneSpec) -> str:
    """Dotted name of the [CLS] token.

    Raises:
        ValueError: the backbone has none.
    """
    for name, _ in backbone.named_parameters():
        if name.rpartition(".")[2] in _CLS:
            return name
    raise ValueError(f"learn_cls: {spec.family} has no [CLS] token that could be trained")
