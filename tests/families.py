"""Small random models of every supported family, with no default that would hide an error."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn

# What a backbone for small images expects, as pcx.backbones.inputs.data_config gives it.
CONFIG = {
    "input_size": (3, 32, 32),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
}
SMALL = {"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3}
SMALL_14 = {**SMALL, "img_size": 56}
NAFLEX = {"depth": 3, "embed_dim": 48, "num_heads": 3}

FAMILIES: dict[str, tuple[str, dict]] = {
    "vit": ("vit_tiny_patch16_224", SMALL),
    "vit-avg": ("vit_tiny_patch16_224", {**SMALL, "global_pool": "avg"}),
    "vit-map": ("vit_tiny_patch16_224", {**SMALL, "global_pool": "map"}),
    "vit-post-norm": ("vit_base_patch16_rpn_224", SMALL),
    "vit-qk-norm": ("vit_tiny_patch16_224", {**SMALL, "qk_norm": True}),
    "vit-xp": ("vit_base_patch16_xp_224", SMALL),
    "vit-18x2": ("vit_small_patch16_18x2_224", SMALL),
    "vit-relpos": ("vit_relpos_small_patch16_224", SMALL),
    "deit": ("deit_tiny_patch16_224", SMALL),
    "deit-distilled": ("deit_tiny_distilled_patch16_224", SMALL),
    "deit3": ("deit3_small_patch16_224", SMALL),
    "dinov2-reg": ("vit_small_patch14_reg4_dinov2", SMALL_14),
    "clip": ("vit_base_patch16_clip_224", SMALL),
    "siglip": ("vit_base_patch16_siglip_224", SMALL),
    "eva02": ("eva02_tiny_patch14_224", SMALL_14),
    "dinov3": ("vit_small_patch16_dinov3", SMALL),
    "rope": ("vit_small_patch16_rope_ape_224", SMALL),
    "beit": ("beit_base_patch16_224", SMALL),
    "beitv2": ("beitv2_base_patch16_224", SMALL),
    "naflexvit": ("naflexvit_base_patch16_gap", SMALL),
    "naflexvit-map": ("naflexvit_base_patch16_map", SMALL),
}


def build(
    family: str, num_classes: int = 7, dtype: torch.dtype = torch.float64, **more: Any
) -> nn.Module:
    """A small random model of a family, in eval mode."""
    name, arguments = FAMILIES[family]
    model = timm.create_model(name, num_classes=num_classes, **{**arguments, **more}).to(dtype)
    randomise(model)
    return model.eval()


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Random norms, biases, LayerScale and weights, so that every parameter matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            if p.dim() < 2:
                p.copy_(0.3 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
            else:
                p.copy_(0.5 * noise / p.shape[-1] ** 0.5)  # attention must not saturate


def image_size(family: str) -> int:
    return FAMILIES[family][1].get("img_size", 64)


def images(family: str, batch: int = 2, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    size = image_size(family)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, size, size, generator=generator, dtype=dtype)


def peaked(family, dtype=torch.float64):
    """A model whose [CLS] looks at a few patches above others, so that some are repeated."""
    model = build(family, dtype=dtype)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[: 2 * model.embed_dim] *= 3
    return model
