"""Backbones by name: the embedded one, timm's, and Hugging Face's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch import nn

from pcx.backbones import NAME, scenes_vit
from pcx.backbones.hugging_face import is_tower
from pcx.backbones.setr import SETR
from pcx.backbones.towers import Tower, with_head
from pcx.backbones.weights_file import with_weights


def build_backbone(
    name: str,
    *,
    pretrained: bool = True,
    weights: Path | None = None,
    num_classes: int = 0,
    setr: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> nn.Module:
    """Builds a backbone by its name.

    Args:
        name: the embedded backbone's, one of `timm.list_models()` with or without a tag, or a
            checkpoint of Hugging Face for image classification ("org/name", or a folder).
        pretrained: whether weights are loaded, timm's from its hub.
        weights: a file of a timm model's weights, in place of timm's download; it is read as data
            alone.
        num_classes: size of the head; 0 for none, or Hugging Face's own.
        setr: further arguments of `SETR`, for a backbone with its decoder; None for none.
        arguments: of a timm model's constructor, such as img_size; of Hugging Face's the class_name
            of a model that has no classifier.

    Raises:
        ValueError: no such name, or `weights` do not go with it, or do not fill the backbone.
        FileNotFoundError: there is no file of weights.
    """
    if setr is not None:
        plain = build_backbone(name, pretrained=pretrained, weights=weights, **arguments)
        return SETR(plain, num_classes, **setr)
    if name == NAME:
        if weights is not None:
            raise ValueError(f"weights: {NAME} has its own; name another backbone")
        return scenes_vit(num_classes, pretrained=pretrained)
    if timm.is_model(name):
        if weights is not None:
            return with_weights(name, Path(weights), num_classes=num_classes, **arguments)
        return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **arguments)
    if "/" in name and weights is None:
        return _hugging_face(name, num_classes, **arguments)
    raise ValueError(
        f"backbone: neither timm nor pcx knows {name!r}; see timm.list_models(), or give a "
        f"checkpoint of Hugging Face as 'org/name', or {NAME}, the embedded backbone"
    )


def with_decoder_of(backbone: nn.Module, arguments: Mapping[str, Any]) -> nn.Module:
    """A backbone with SETR's decoder where arguments of `build_backbone` name one, without it else.

    The decoder gives features; its weights are to be set.
    """
    plain = backbone.tower if isinstance(backbone, SETR) else backbone
    return plain if arguments.get("setr") is None else SETR(plain, 0, **arguments["setr"])


def _hugging_face(name: str, num_classes: int, class_name: str | None = None) -> nn.Module:
    """A checkpoint by its class for image classification, or by the class of that name."""
    try:
        import transformers
    except ImportError:
        raise ValueError(
            f"backbone: {name!r} is a checkpoint of Hugging Face; pip install transformers"
        ) from None
    built: Any = transformers.AutoModelForImageClassification
    if class_name is not None:
        built = getattr(transformers, class_name, None)
        if not (isinstance(built, type) and issubclass(built, transformers.PreTrainedModel)):
            raise ValueError(
                f"backbone: {name!r} is of a class {class_name!r} that the transformers installed "
                f"here ({transformers.__version__}) has not; install a version that has it"
            )
    found = built.from_pretrained(name)
    return with_head(found, num_classes) if num_classes else found


def arguments_of(backbone: Any) -> dict[str, Any]:
    """The arguments of `build_backbone` that can be read off a model, as JSON.

    Depth, width and the like cannot; a fingerprint tells such models apart.
    """
    if isinstance(backbone, SETR):
        made = {"decoder": backbone.decoder.kind, "channels": backbone.decoder.channels}
        return {"setr": made, **arguments_of(backbone.tower)}
    if isinstance(backbone, Tower):
        return arguments_of(backbone.tower)
    if is_tower(backbone):
        return {"class_name": type(backbone).__name__}
    if not hasattr(backbone, "pretrained_cfg"):
        return {}
    found: dict[str, Any] = {}
    pool = getattr(backbone, "global_pool", None)
    if isinstance(pool, str):
        found["global_pool"] = pool
    size = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
    trained_on = (backbone.pretrained_cfg or {}).get("input_size")
    if size is not None and trained_on is not None and tuple(size) != tuple(trained_on[1:]):
        found["img_size"] = list(size)
    return found
