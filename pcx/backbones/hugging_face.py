"""Facts of Hugging Face's models that running them does not show."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pcx.backbones.timm_vit import listed_in

# Read tokens of their heads; the others read all tokens.
_READ = {
    "ViTForImageClassification": 1,
    "DeiTForImageClassification": 1,
    "DeiTForImageClassificationWithTeacher": 2,
}


def facts_of(backbone: Any) -> dict[str, Any]:
    """Fields of a `BackboneSpec`.

    Raises:
        ValueError: the model has no linear classifier.
    """
    heads = tuple(
        name
        for name in ("classifier", "cls_classifier", "distillation_classifier")
        if hasattr(getattr(backbone, name, None), "in_features")  # peft may have wrapped it
    )
    if not heads:
        raise ValueError("it has no linear classifier: use its ...ForImageClassification class")
    config = backbone.config
    patch = getattr(config, "patch_size", None)
    patch = patch if isinstance(patch, int) or patch is None else patch[0]
    return {
        "heads": heads,
        "listed": _listed(backbone),
        "dim": backbone.get_submodule(heads[0]).in_features,
        "prefix_tokens": sum(map(len, _prefix(backbone).values())),
        "read_tokens": _READ.get(type(backbone).__name__),
        "has_cls": "cls_token" in _prefix(backbone),
        "patch_elements": None if patch is None else 3 * patch**2,
    }


def _listed(backbone: Any) -> tuple[str, ...]:
    for blocks in ("layers", "encoder.layer", "encoder.layers", "layer"):
        found = listed_in(backbone, f"{backbone.base_model_prefix}.{blocks}")
        if found:
            return found
    return ()


def _prefix(backbone: nn.Module) -> dict[str, range]:
    """The kinds of tokens before the patches, and their places."""
    kinds = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
    found: dict[str, range] = {}
    for module in backbone.modules():
        for kind in kinds:
            token = getattr(module, kind, None)
            if isinstance(token, torch.Tensor) and kind not in found:
                count = token.shape[1] if token.dim() == 3 else 1
                start = sum(map(len, found.values()))
                found[kind.replace("class_embedding", "cls_token")] = range(start, start + count)
    return found
