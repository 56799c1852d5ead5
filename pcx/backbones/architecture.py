"""Facts of a backbone's architecture that change what it computes and that weights do not show."""

from __future__ import annotations

from typing import Any

from torch import nn

from pcx.backbones.inputs import input_size
from pcx.backbones.spec import BackboneSpec


def architecture_of(backbone: nn.Module, spec: BackboneSpec) -> dict[str, Any]:
    """The facts as JSON: class, image size, depth, heads, head dims, eps, activations, pooling."""
    pool = getattr(backbone, "global_pool", None)
    eps = {m.eps for m in backbone.modules() if isinstance(getattr(m, "eps", None), float)}
    return {
        "class": spec.family,
        "image_size": list(input_size(backbone)),
        "depth": len(spec.blocks),
        "heads": [block.heads for block in spec.blocks],
        "head_dims": [block.head_dim for block in spec.blocks],
        "eps": sorted(eps),
        "activations": sorted({type(m).__name__ for m in backbone.modules() if _activates(m)}),
        "pooling": pool if isinstance(pool, str | None) else type(pool).__name__,
        "prefix_tokens": spec.prefix_tokens,
    }


def _activates(module: nn.Module) -> bool:
    """Whether a module is of a library's file of activations and has no weights."""
    home = type(module).__module__.rpartition(".")[2]
    return home.startswith("activation") and not any(True for _ in module.parameters())


def differences(saved: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What differs between two backbones' facts, but for the image size, in words."""
    return [
        f"{name} {saved[name]} (now {found[name]})"
        for name in saved
        if name in found and name != "image_size" and saved[name] != found[name]
    ]
