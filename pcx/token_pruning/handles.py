"""Handles of what is set up on a model, and the models that it can be set up on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pcx.backbones import attention
from pcx.backbones.spec import Anatomy, dissect
from pcx.models.block_forward import StandIn, found_on
from pcx.models.vpt.model import VPT
from pcx.ops.reference.attention import additive

# Families whose blocks know nothing of where a token stands.
FAMILIES = (
    "VisionTransformer",
    "VisionTransformerDistilled",
    "ViTForImageClassification",
    "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
    "Dinov2ForImageClassification",
    "Dinov2WithRegistersForImageClassification",
)


class SetUp:
    """Stand-ins on a model; `remove` takes them away again. A copy of the model has no handle.

    Attributes:
        prefix_tokens: tokens before the patches.
        patch_pixels: of one patch.
    """

    def __init__(self, stand_ins: Sequence[StandIn], anatomy: Anatomy):
        self.prefix_tokens = anatomy.prefix_tokens
        self.patch_pixels = anatomy.patch_elements // 3
        self._stand_ins = tuple(stand_ins)

    def remove(self) -> None:
        """The model computes all tokens again."""
        for stand_in in self._stand_ins:
            stand_in.remove()


def biased(call: attention.Call, bias: Tensor) -> attention.Call:
    """The call with a bias of its keys besides its own, [B, 1, 1, S], additive or boolean."""
    if call.bias is not None:
        wide = torch.promote_types(call.q.dtype, torch.float32)
        bias = additive(call.bias, wide) + additive(bias, wide)
    if bias.dtype != torch.bool:
        bias = bias.to(call.q.dtype)
    return dataclasses.replace(call, bias=bias)


def seen(name: str, found: Sequence[Any]) -> list[Any]:
    """What the last batch left in stand-ins, for a handle's property of that name.

    Raises:
        RuntimeError: some of it is None.
    """
    if any(each is None for each in found):
        raise RuntimeError(f"{name}: no batch has gone through the model yet")
    return list(found)


def composed(stays: Sequence[Tensor | None]) -> list[Tensor]:
    """The places [B, n] that each step's tokens had in the sequence that came to the first step.

    Args:
        stays: of each step, the places [B, n] among the tokens that came to it.
    """
    places: list[Tensor] = []
    for each in seen("kept", stays):
        places.append(places[-1].gather(1, each) if places else each)
    return places


def anatomy_of(model: Any) -> Anatomy:
    """The anatomy of a VPT or a backbone, whatever stands in on it."""
    if isinstance(model, VPT):
        return model.anatomy
    before = found_on(model)
    for stand_in in before:
        stand_in.remove()
    try:
        return dissect(model)  # which runs the blocks
    finally:
        for stand_in in before:
            stand_in.install()


def blocks_of(model: Any, anatomy: Anatomy) -> list[Any]:
    """The blocks, first to last.

    Raises:
        ValueError: the model's attention is not one call per block that leaves out where tokens
            stand, or prompts are among its tokens.
    """
    if anatomy.family not in FAMILIES:
        raise ValueError(
            f"model: {anatomy.family} turns or biases attention by the tokens' places, which "
            f"pruning would mix up; expected one of {FAMILIES}"
        )
    if max(anatomy.calls) > 1:
        raise ValueError(f"model: {anatomy.family} attends {max(anatomy.calls)} times in a block")
    if isinstance(model, VPT) and model.path != "folded":
        raise ValueError(f"model: its path is {model.path!r}, expected 'folded'")
    return list(backbone_of(model).get_submodule(anatomy.blocks))


def backbone_of(model: Any) -> Any:
    return model.backbone if isinstance(model, VPT) else model


def patches_of(model: Any) -> int | None:
    """Of the images that the backbone was made for, None where it does not say."""
    for module in backbone_of(model).modules():
        if isinstance(getattr(module, "num_patches", None), int):
            return module.num_patches
    return None


def clear(model: nn.Module, blocks: Sequence[Any], layers: Sequence[int]) -> None:
    """Removes what stands in on a model, so that others can on these of its layers, from 1.

    Raises:
        ValueError: something that is not of pcx stands in for a block's forward.
    """
    for layer in layers:
        if not isinstance(blocks[layer - 1].__dict__.get("forward"), StandIn | None):
            raise ValueError(f"model: something else stands in for layer {layer}'s forward")
    for old in found_on(model):
        old.remove()
