"""Facts of Hugging Face's models that running them does not show."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pcx.backbones.timm_vit import listed_in

# How many tokens at the front their heads, or poolers, read; the others read all tokens.
_READ = {
    "ViTForImageClassification": 1,
    "ViTModel": 1,
    "DeiTForImageClassification": 1,
    "DeiTForImageClassificationWithTeacher": 2,
    "DeiTModel": 1,
    "Dinov2Model": 1,
    "Dinov2WithRegistersModel": 1,
    "DINOv3ViTModel": 1,
    "CLIPVisionModel": 1,
    "CLIPVisionModelWithProjection": 1,
}
_CLASSIFIERS = ("classifier", "cls_classifier", "distillation_classifier")


def facts_of(backbone: Any) -> dict[str, Any]:
    """Fields of a `BackboneSpec`.

    Raises:
        ValueError: the model reads text too, or leaves patches out at random.
    """
    heads = _heads(backbone)
    if backbone.main_input_name != "pixel_values":
        raise ValueError(
            f"it reads {backbone.main_input_name} too; give its .vision_model, or the "
            "...ForImageClassification or ...VisionModel class of its checkpoint"
        )
    config = backbone.config
    masked: Any = getattr(config, "mask_ratio", None)
    if not heads and masked:
        raise ValueError(
            "it leaves patches out at random (mask_ratio); give ViTForImageClassification or "
            "ViTModel of the same checkpoint"
        )
    patch = getattr(vision_config(config), "patch_size", None)
    patch = patch if isinstance(patch, int) or patch is None else patch[0]
    return {
        "heads": heads,
        "listed": _listed(backbone),
        "dim": _width(backbone, heads),
        "prefix_tokens": sum(map(len, _prefix(backbone).values())),
        "read_tokens": _READ.get(type(backbone).__name__),
        "has_cls": "cls_token" in _prefix(backbone),
        "patch_elements": None if patch is None else 3 * patch**2,
    }


def vision_config(config: Any) -> Any:
    """A model's configuration, or the part of it that is of images, where it has parts."""
    return getattr(config, "vision_config", config)


def is_tower(backbone: Any) -> bool:
    """Whether a model is of Hugging Face and has no classifier."""
    packages = {cls.__module__.partition(".")[0] for cls in type(backbone).__mro__}
    return "transformers" in packages and not _heads(backbone)


def leave_out_drawn_pooler(backbone: Any) -> None:
    """Leaves out a pooler of BERT's form, which checkpoints of ViT and DeiT do not have.

    Hugging Face then draws its weights at random. [CLS] behind the last norm is read instead, as
    their ...ForImageClassification classes do.
    """
    if hasattr(getattr(backbone, "pooler", None), "dense"):
        backbone.pooler = None


def tell_size(backbone: Any, num_classes: int | None) -> None:
    """Tells a model that its classifier was exchanged."""
    if hasattr(backbone, "config") and hasattr(backbone, "num_labels"):
        backbone.config.num_labels = backbone.num_labels = num_classes


def _heads(backbone: Any) -> tuple[str, ...]:
    """Dotted names of the linear classifiers."""
    parts = {name: getattr(backbone, name, None) for name in _CLASSIFIERS}
    return tuple(n for n, part in parts.items() if hasattr(part, "in_features"))  # or peft's


def _width(backbone: Any, heads: tuple[str, ...]) -> int:
    if heads:
        return backbone.get_submodule(heads[0]).in_features
    return vision_config(backbone.config).hidden_size


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
