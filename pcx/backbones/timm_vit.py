"""Facts of timm's models that running them does not show."""

from __future__ import annotations

import math
from typing import Any

from torch import nn


def facts_of(backbone: Any) -> dict[str, Any]:
    """Fields of a `BackboneSpec`.

    Raises:
        AttributeError: the model is not made like timm's.
    """
    classifiers = backbone.get_classifier()
    classifiers = classifiers if isinstance(classifiers, tuple) else (classifiers,)
    embed = getattr(backbone, "patch_embed", None) or getattr(backbone, "embeds", None)
    patch = getattr(embed, "patch_size", None)
    patch = patch if isinstance(patch, tuple) or patch is None else (patch, patch)
    return {
        "heads": _names(backbone, [m for each in classifiers for m in _linear(backbone, each)]),
        "listed": listed_in(backbone, "blocks"),
        "dim": getattr(backbone, "embed_dim", None) or backbone.num_features,
        "prefix_tokens": getattr(backbone, "num_prefix_tokens", 0),
        "read_tokens": _read_tokens(backbone),
        "has_cls": any(getattr(m, "cls_token", None) is not None for m in (backbone, embed)),
        "patch_elements": None if patch is None else 3 * math.prod(patch),
    }


def listed_in(backbone: nn.Module, container: str) -> tuple[str, ...]:
    """Dotted names of the modules in a list of blocks, none where there is no such list."""
    try:
        blocks = backbone.get_submodule(container)
    except AttributeError:
        return ()
    if not isinstance(blocks, nn.Sequential | nn.ModuleList):
        return ()
    return tuple(f"{container}.{i}" for i in range(len(blocks)))


def _read_tokens(backbone: Any) -> int | None:
    """How many tokens the head reads, where these stand at the front and are not rotated."""
    pool = getattr(backbone, "global_pool", None)
    if getattr(backbone, "attn_pool", None) is not None or pool != "token":
        return None
    read = 2 if hasattr(backbone, "head_dist") else 1
    return read if read <= getattr(backbone, "num_prefix_tokens", 0) else None


def _linear(backbone: Any, classifier: nn.Module) -> list[nn.Module]:
    """The linear layers that give logits in a classifier of timm's: a norm and one, or several.

    Another classifier, such as a user's own, is taken as a whole. One without weights, which pools
    and norms at most, is none.
    """
    container = isinstance(classifier, nn.ModuleList)
    if not (container or type(classifier).__module__.startswith("timm.")):
        return [classifier]
    if not backbone.num_classes:
        return []
    found: list[nn.Module] = [
        module
        for module in classifier.modules()
        if isinstance(module, nn.Linear) and module.out_features == backbone.num_classes
    ]
    return found or [classifier]


def _names(backbone: nn.Module, modules: list[nn.Module]) -> tuple[str, ...]:
    return tuple(
        next(name for name, module in backbone.named_modules() if module is wanted)
        for wanted in modules
        if not isinstance(wanted, nn.Identity)
    )
