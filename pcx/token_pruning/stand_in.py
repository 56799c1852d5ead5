"""Objects that stand in for the forwards of a model's blocks, and the models that can have them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pcx import seam
from pcx.anatomy import Anatomy, dissect
from pcx.ops import reference
from pcx.prompted_block import PromptedBlock
from pcx.vpt import VPT

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


class Carried(NamedTuple):
    """Tokens on their way to the next block, whose stand-in has to know more of them.

    What is known travels with the tokens and is kept nowhere, so that compiled graphs, scoring's
    replays, checkpointing around blocks and several forwards before a backward are all right.
    """

    tokens: Tensor  # [B, N, D]
    known: Any


class StandIn:
    """Stands in for a block's forward; an object, so that a copied model has its own.

    It may change the attention call that the block makes, and gives what goes on to the next block.
    """

    def __init__(self, block: nn.Module):
        self.block = block
        self.install()

    def install(self) -> None:
        self.block.forward = self  # type: ignore[assignment]

    def remove(self) -> None:
        if self.block.__dict__.get("forward") is self:
            del self.block.forward

    def before(self, call: seam.Call, known: Any) -> seam.Call:
        """The call to make in place of the block's; `known` is None where nothing was carried."""
        return call

    def after(self, tokens: Tensor, call: seam.Call, known: Any) -> Tensor | Carried:
        """What goes on in place of the block's output [B, N, D], by the call it attended with."""
        raise NotImplementedError

    def __call__(self, x: Tensor | Carried, *args, **kwargs) -> Any:
        if isinstance(self.block, PromptedBlock) and self.block.replay is not None:
            return self.block.replay  # what this gave before
        tokens, known = x if isinstance(x, Carried) else (x, None)
        calls: list[seam.Call] = []

        def watch(call: seam.Call) -> seam.Call:
            calls.append(self.before(call, known))
            if calls[-1] is not call and self._recomputes_within():
                raise RuntimeError(
                    f"model: {type(self.block).__name__} recomputes itself in the backward pass, "
                    "where its attention would not be changed; turn gradient checkpointing off"
                )
            return calls[-1]

        out = self._run(watch, tokens, *args, **kwargs)
        if not calls:
            raise seam.MissedCall(
                f"{type(self.block).__name__} made no call of F.scaled_dot_product_attention: turn "
                "its fused attention on (fused_attn=True, attn_implementation='sdpa')"
            )
        call = calls[0]
        calls.clear()  # checkpointing holds on to `watch`, and need not to these tensors
        if isinstance(out, tuple):  # Hugging Face's older layers
            return (self.after(out[0], call, known), *out[1:])
        return self.after(out, call, known)

    def _recomputes_within(self) -> bool:
        """Whether the block's own forward is checkpointed, as Hugging Face's are."""
        on = getattr(self.block, "gradient_checkpointing", False)
        return bool(on) and self.block.training and torch.is_grad_enabled()

    def _run(self, watch: seam.Watch, x: Tensor, *args, **kwargs) -> Any:
        forward: Any = type(self.block).forward
        if isinstance(self.block, PromptedBlock):
            if self.block.path != "folded":
                raise RuntimeError("model: path 'concat' has prompts among the tokens; fold them")
            return forward(self.block, x, *args, watch=watch, **kwargs)
        with seam.intercept(lambda _, call: watch(call).output(), []):
            return forward(self.block, x, *args, **kwargs)


def read_tokens_of(block: PromptedBlock) -> int | None:
    """How many tokens a VPT's last block computes, but for what a stand-in has set meanwhile."""
    forward = block.__dict__.get("forward")
    return getattr(forward, "read_tokens", block.read_tokens)


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


def biased(call: seam.Call, bias: Tensor) -> seam.Call:
    """The call with a bias of its keys besides its own, [B, 1, 1, S], additive or boolean."""
    if call.bias is not None:
        wide = torch.promote_types(call.q.dtype, torch.float32)
        bias = reference.additive(call.bias, wide) + reference.additive(bias, wide)
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


def found_on(model: nn.Module) -> list[StandIn]:
    """What stands in on a model."""
    found = [module.__dict__.get("forward") for module in model.modules()]
    return [forward for forward in found if isinstance(forward, StandIn)]
