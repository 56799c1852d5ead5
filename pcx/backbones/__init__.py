"""The backbone that travels with the package: a small ViT trained on procedural scenes."""

from __future__ import annotations

from importlib import resources
from typing import Any

from safetensors.torch import load
from timm.models.vision_transformer import VisionTransformer

from pcx.tasks.scenes import NUM_CLASSES as UPSTREAM_CLASSES

NAME = "pcx_scenes_vit"
WEIGHTS = "scenes_vit.safetensors"


def scenes_vit(num_classes: int = 0, *, pretrained: bool = True) -> VisionTransformer:
    """The embedded ViT: 64x64 images, patch 8, width 96, 6 blocks, 3 heads, 0.7 M parameters.

    Trained by `python -m pcx.experiments.pretrain` on the upstream task of `pcx.tasks.scenes`; the
    training log with its accuracy lies beside the weights (`scenes_vit.csv`).

    Args:
        num_classes: size of a new, untrained head; 0 for none; 64 keeps the upstream head.
        pretrained: load the weights in the package; False gives the untrained architecture.
    """
    model: Any = VisionTransformer(
        img_size=64,
        patch_size=8,
        embed_dim=96,
        depth=6,
        num_heads=3,
        num_classes=UPSTREAM_CLASSES,
    )
    model.pretrained_cfg = model.default_cfg = {
        "architecture": NAME,
        "input_size": (3, 64, 64),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "num_classes": UPSTREAM_CLASSES,
        "classifier": "head",
        "first_conv": "patch_embed.proj",
    }
    if pretrained:
        model.load_state_dict(load(resources.files(__name__).joinpath(WEIGHTS).read_bytes()))
    if num_classes != UPSTREAM_CLASSES:
        model.reset_classifier(num_classes)
    return model.eval()
