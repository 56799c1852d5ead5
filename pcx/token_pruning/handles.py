"""Handles of what is set up on a model, and the models that it can be set up on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pcx.backbones import attention
from pcx.backbones.spec import BackboneSpec, check_promptable, find_spec
from pcx.models.base import TunedModel
from pcx.models.block_forward import StandIn, found_on
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


class Handle:
    """Stand-ins on a model; `remove` takes them away again. A copy of the model has no handle.

    Attributes:
        prefix_tokens: tokens before the patches.
        patch_pixels: of one patch.
    """

    def __init__(
        self, stand_ins: Sequence[StandIn], spec: BackboneSpec, name: str, arguments: dict[str, Any]
    ):
        self.prefix_tokens = spec.prefix_tokens
        self.patch_pixels = (spec.patch_elements or 0) // 3
        self._stand_ins = tuple(stand_ins)
        for stand_in in self._stand_ins:
            stand_in.reduction = {"name": name, "arguments": arguments}

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


def spec_of(model: Any) -> BackboneSpec:
    """The spec of a tuned model or a backbone, whatever stands in on it.

    A backbone's fused attention is turned on.

    Raises:
        ValueError: its tokens meet elsewhere than in the blocks' attention.
    """
    if isinstance(model, TunedModel):
        attention.fuse(model.plain_backbone())
        return model.spec
    before = found_on(model)
    for stand_in in before:
        stand_in.remove()
    try:
        spec = find_spec(model)
        attention.fuse(model)
        check_promptable(model, spec)  # which runs the blocks
        return spec
    finally:
        for stand_in in before:
            stand_in.install()


def blocks_of(model: Any, spec: BackboneSpec) -> list[Any]:
    """The blocks, first to last.

    Raises:
        ValueError: the model's attention is not one call per block that leaves out where tokens
            stand, or prompts are among its tokens.
    """
    if spec.family not in FAMILIES:
        raise ValueError(
            f"model: {spec.family} turns or biases attention by the tokens' places, which "
            f"pruning would mix up; expected one of {FAMILIES}"
        )
    calls = max(block.calls for block in spec.blocks)
    if calls > 1:
        raise ValueError(f"model: {spec.family} attends {calls} times in a block")
    if isinstance(model, TunedModel) and model.adds_tokens:
        raise ValueError("model: its path is 'concat', expected 'folded'")
    return spec.blocks_in(backbone_of(model))


def backbone_of(model: Any) -> Any:
    """A tuned model's backbone; any other model is one itself."""
    return model.plain_backbone() if isinstance(model, TunedModel) else model


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
