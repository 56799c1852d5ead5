"""Facts of open_clip's vision towers that running them does not show."""

from __future__ import annotations

import math
from typing import Any

from pcx.backbones.timm_vit import listed_in


def facts_of(backbone: Any) -> dict[str, Any]:
    """Fields of a `BackboneSpec`.

    Raises:
        ValueError: the model is not a vision transformer.
    """
    if hasattr(backbone, "visual"):
        raise ValueError("it holds an image tower and a text tower; give its .visual")
    if not hasattr(backbone, "class_embedding"):
        raise ValueError(
            "of open_clip's towers only its own VisionTransformer is known; one that open_clip "
            "takes from timm is its .trunk"
        )
    reads_token = backbone.attn_pool is None and backbone.pool_type == "tok"
    return {
        "heads": (),
        "listed": listed_in(backbone, "transformer.resblocks"),
        "dim": backbone.output_dim,
        "prefix_tokens": 1,
        "read_tokens": 1 if reads_token else None,
        "has_cls": True,
        "patch_elements": 3 * math.prod(backbone.patch_size),
    }
