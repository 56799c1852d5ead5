"""Where a backbone keeps what pcx needs: its blocks, heads, prefix tokens and patch size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pcx.backbones import attention

SUPPORTED = (
    "timm's VisionTransformer (ViT, AugReg, DeiT, DeiT-III, DINOv2, CLIP, SigLIP and others), "
    "VisionTransformerDistilled, VisionTransformerRelPos, Eva (EVA-02, DINOv3, RoPE ViTs), Beit, "
    "NaFlexVit, and Hugging Face's ...ForImageClassification of ViT, DeiT and DINOv2"
)

# Read tokens of Hugging Face heads; the others read all tokens.
_HF_READ = {
    "ViTForImageClassification": 1,
    "DeiTForImageClassification": 1,
    "DeiTForImageClassificationWithTeacher": 2,
}


@dataclass(frozen=True)
class Anatomy:
    """What pcx knows of a backbone.

    `read_tokens` counts the tokens at the front that the head reads, None where it reads more.
    """

    family: str
    blocks: str  # dotted name of the container of the blocks
    heads: tuple[str, ...]  # dotted names of the classifier modules
    dim: int
    prefix_tokens: int  # [CLS], distillation and register tokens at the front
    read_tokens: int | None
    has_cls: bool  # whether the first token is [CLS]
    patch_elements: int  # 3 * patch height * patch width, as the published initialisation has it
    calls: tuple[int, ...]  # attention calls per block
    heads_dims: tuple[tuple[int, int, int], ...]  # (H, d, dv) of each block's first call


def dissect(backbone: Any) -> Anatomy:
    """Reads a backbone's anatomy, turning its fused attention on.

    Raises:
        ValueError: the family is not supported; names it, why, and what is.
    """
    family = type(backbone).__name__
    try:
        find = _hugging_face if type(backbone).__module__.startswith("transformers.") else _timm
        found = find(backbone)
        _fuse(backbone)
        shapes = [_probed(block, found["dim"]) for block in backbone.get_submodule(found["blocks"])]
    except (
        AssertionError,
        AttributeError,
        KeyError,
        ValueError,
        TypeError,
        RuntimeError,
    ) as error:
        raise ValueError(
            f"backbone: {family} is not supported: {error}. Supported: {SUPPORTED}"
        ) from error
    return Anatomy(
        family=family,
        calls=tuple(count for count, _ in shapes),
        heads_dims=tuple(dims for _, dims in shapes),
        **found,
    )


def _probed(block: nn.Module, dim: int) -> tuple[int, tuple[int, int, int]]:
    calls = attention.probe(block, dim)
    first = calls[0]
    return len(calls), (first.k.shape[1], first.k.shape[3], first.v.shape[3])


def _fuse(backbone: Any) -> None:
    if hasattr(backbone, "set_attn_implementation"):
        backbone.set_attn_implementation("sdpa")
    for module in backbone.modules():
        if getattr(module, "fused_attn", True) is False:
            module.fused_attn = True


def _timm(backbone: Any) -> dict:
    if not isinstance(getattr(backbone, "blocks", None), nn.Sequential | nn.ModuleList):
        raise ValueError("it has no list of blocks over one sequence of tokens")
    classifiers = backbone.get_classifier()
    classifiers = classifiers if isinstance(classifiers, tuple) else (classifiers,)
    embed = getattr(backbone, "patch_embed", None) or backbone.embeds
    patch = embed.patch_size
    patch = patch if isinstance(patch, tuple) else (patch, patch)
    return {
        "blocks": "blocks",
        "heads": _names(backbone, classifiers),
        "dim": backbone.embed_dim,
        "prefix_tokens": backbone.num_prefix_tokens,
        "read_tokens": _timm_read(backbone),
        "has_cls": any(getattr(m, "cls_token", None) is not None for m in (backbone, embed)),
        "patch_elements": 3 * math.prod(patch),
    }


def _timm_read(backbone: Any) -> int | None:
    """Exact only where the pooling takes tokens at the front that no position rotates."""
    if getattr(backbone, "attn_pool", None) is not None or backbone.global_pool != "token":
        return None
    read = 2 if hasattr(backbone, "head_dist") else 1
    return read if read <= backbone.num_prefix_tokens else None


def _hugging_face(backbone: Any) -> dict:
    heads = tuple(
        name
        for name in ("classifier", "cls_classifier", "distillation_classifier")
        if isinstance(getattr(backbone, name, None), nn.Linear)
    )
    if not heads:
        raise ValueError("it has no linear classifier: use its ...ForImageClassification class")
    body_name = backbone.base_model_prefix
    body = getattr(backbone, body_name)
    for blocks in ("layers", "encoder.layer", "encoder.layers", "layer"):
        try:
            body.get_submodule(blocks)
        except AttributeError:
            continue
        break
    else:
        raise ValueError("its list of layers was not found")
    config = backbone.config
    patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]
    return {
        "blocks": f"{body_name}.{blocks}",
        "heads": heads,
        "dim": config.hidden_size,
        "prefix_tokens": _hf_prefix_tokens(body, config),
        "read_tokens": _HF_READ.get(type(backbone).__name__),
        "has_cls": True,
        "patch_elements": 3 * patch**2,
    }


def _hf_prefix_tokens(body: Any, config: Any) -> int:
    tokens = 1 + (getattr(config, "num_register_tokens", 0) or 0)
    embeddings = getattr(body, "embeddings", None)
    return tokens + isinstance(getattr(embeddings, "distillation_token", None), torch.Tensor)


def _names(backbone: nn.Module, modules: tuple[nn.Module, ...]) -> tuple[str, ...]:
    return tuple(
        next(name for name, module in backbone.named_modules() if module is wanted)
        for wanted in modules
        if not isinstance(wanted, nn.Identity)
    )
