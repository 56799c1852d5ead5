"""The handle that every token reduction returns, and checks of the models it can be set up on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pcx.backbones import attention
from pcx.backbones.probing import without_hooks
from pcx.backbones.spec import BackboneSpec, check_promptable, find_spec, pools_by_token
from pcx.models.base import TunedModel, check_module, keeping_modes
from pcx.models.block_forward import StandIn, found_on, without_stand_ins
from pcx.ops.reference.attention import additive

# Families whose blocks are known not to depend on the position of a token, so that tokens may be
# dropped. Blocks of others are run, see `_mind_places`.
FAMILIES = (
    "VisionTransformer",
    "VisionTransformerDistilled",
    "ViTForImageClassification",
    "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
    "Dinov2ForImageClassification",
    "Dinov2WithRegistersForImageClassification",
)

_MAPS = ("forward_intermediates", "get_intermediate_layers")  # timm's


class Handle:
    """A token reduction that is set up on a model; `remove` takes it away again.

    A copy of the model keeps the reduction but has no handle.

    Args:
        stand_ins: the objects that stand in for the blocks' forwards.
        spec: the backbone's spec.
        name: the reduction's name in `pcx.models.REDUCTIONS`.
        arguments: its arguments as JSON, by which a saved model is set up again.

    Attributes:
        prefix_tokens: number of tokens before the patches: [CLS] and registers.
        patch_pixels: number of pixels of one patch.
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
        """Removes the reduction: the model computes all tokens again."""
        for stand_in in self._stand_ins:
            stand_in.remove()


def biased(call: attention.Call, bias: Tensor) -> attention.Call:
    """The attention call with one more bias on its keys.

    Args:
        call: the call, with or without a bias of its own.
        bias: [B, 1, 1, S], additive or boolean (True attends).
    """
    if call.bias is not None:
        wide = torch.promote_types(call.q.dtype, torch.float32)
        bias = additive(call.bias, wide) + additive(bias, wide)
    if bias.dtype != torch.bool:
        bias = bias.to(call.q.dtype)
    return dataclasses.replace(call, bias=bias)


def of_last_batch(name: str, values: Sequence[Any]) -> list[Any]:
    """The values that stand-ins kept of the last batch.

    Args:
        name: the handle's property that shows them, for the message.
        values: one value per stand-in, None before the first batch.

    Raises:
        RuntimeError: a value is None.
    """
    if any(value is None for value in values):
        raise RuntimeError(f"{name}: no batch has gone through the model yet; call the model first")
    return list(values)


def places_at_first_step(stays: Sequence[Tensor | None]) -> list[Tensor]:
    """Places [B, n] of the tokens left after each step, in the sequence before the first step.

    Args:
        stays: for each step, the places [B, n] of the tokens that stay, in the sequence before
            that step.
    """
    places: list[Tensor] = []
    for each in of_last_batch("kept", stays):
        places.append(places[-1].gather(1, each) if places else each)
    return places


def spec_of(model: Any) -> BackboneSpec:
    """Finds the spec of a tuned model or a backbone, and turns on its fused attention.

    A reduction that is set up on the model is left out of the probing and put back afterwards.

    Raises:
        ValueError: tokens are mixed elsewhere than in the blocks' attention.
    """
    check_module("model", model)
    if isinstance(model, TunedModel):
        attention.fuse(model.plain_backbone())
        return model.spec
    with without_stand_ins(model), keeping_modes(model):
        model.eval()  # the blocks run twice, and must compute the same
        spec = find_spec(model)
        attention.fuse(model)
        if spec.is_one_sequence:
            check_promptable(model, spec)
        return spec


def blocks_of(model: Any, spec: BackboneSpec) -> list[Any]:
    """The model's blocks from first to last, checked for token reduction.

    Raises:
        ValueError: attention depends on the tokens' positions, the head reads a map of all tokens,
            a block makes several attention calls, or prompts are among the tokens.
    """
    if spec.reads_map:
        raise ValueError(
            f"model: the decoder of this {spec.family} reads a map of all image tokens, of which "
            "none may go; use a model with a classifier"
        )
    blocks = spec.blocks_in(backbone_of(model))
    classes = {cls.__name__ for cls in type(backbone_of(model)).__mro__}
    reason = None if classes.intersection(FAMILIES) else _mind_places(model, blocks, spec)
    if reason is not None:
        raise ValueError(
            f"model: {spec.family} {reason}, so that tokens cannot be dropped or merged; "
            "docs/families.md says which models can"
        )
    calls = max(block.calls for block in spec.blocks)
    if calls > 1:
        raise ValueError(
            f"model: {spec.family} attends {calls} times in a block, expected once; use a model of "
            f"one of {FAMILIES}"
        )
    if isinstance(model, TunedModel) and model.adds_tokens:
        raise ValueError(
            "model: its path is 'concat', which puts prompts among the tokens; set model.path = "
            "'folded'"
        )
    return blocks


@torch.no_grad()
def _mind_places(model: Any, blocks: Sequence[nn.Module], spec: BackboneSpec) -> str | None:
    """Why tokens of blocks cannot leave their places, None where they can.

    Each block is run on made-up tokens, on the same in another order, and on some of them.
    """
    if not spec.blocks or not spec.is_one_sequence:
        return "has windows or stages, or no blocks that were found"
    turns = "turns or biases attention by the tokens' places"
    with keeping_modes(model), without_stand_ins(model), without_hooks(model):
        model.eval()
        for block, known in zip(blocks, spec.blocks, strict=True):
            given = dict(zip(known.arguments, known.values, strict=True))
            if not all(v is None or isinstance(v, bool) for v in given.values()):
                return turns  # by what it is given: rotations, masks
            tokens = attention.made_up_tokens(block, known.dim)
            try:
                whole, turned, fewer = (
                    _first(block(some, **given)) for some in (tokens, tokens.flip(1), tokens[:, :2])
                )
            except (RuntimeError, ValueError, IndexError):  # a bias for other tokens does not fit
                return turns
            near = 1e-3 * float(whole.abs().max())
            if not torch.allclose(turned.flip(1), whole, rtol=1e-3, atol=near):
                return turns
            if fewer.shape != tokens[:, :2].shape or not fewer.isfinite().all():
                return "computes something else for fewer tokens"
    return None


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def backbone_of(model: Any) -> Any:
    """A tuned model's backbone; any other model is one itself."""
    return model.plain_backbone() if isinstance(model, TunedModel) else model


def listed(name: str, value: Any) -> list[Any] | None:
    """The items of a sequence or of a NumPy array, None of a single value.

    Raises:
        ValueError: the value is text.
    """
    if isinstance(value, str | bytes):
        raise ValueError(f"{name}: {value!r}, expected numbers")
    return list(value) if isinstance(value, Iterable) else None


def one_each(name: str, value: Any, layers: int) -> list[Any]:
    """A value for each layer: one for all of them, or one each.

    Raises:
        ValueError: there are values for another number of layers.
    """
    each = listed(name, value)
    if each is None:
        return [value] * layers
    if len(each) != layers:
        raise ValueError(
            f"{name}: {len(each)} values for {layers} layers; give one value, or one per layer"
        )
    return each


def check_still_reads_cls(backbone: Any) -> None:
    """Raises a RuntimeError where the head was given another pooling than by [CLS] later."""
    if not pools_by_token(backbone):
        raise RuntimeError(
            f"model: its pooling was changed to {backbone.global_pool!r} after tokens were set up "
            "to be dropped for a head that reads [CLS]; change it first, and set up again"
        )


def patches_of(model: Any) -> int | None:
    """The number of patches of an image, or None if the backbone does not state it."""
    for module in backbone_of(model).modules():
        if isinstance(getattr(module, "num_patches", None), int):
            return module.num_patches
    return None


def clear(model: nn.Module, blocks: Sequence[Any], layers: Sequence[int]) -> None:
    """Makes a model ready for a reduction: every other one is removed from it.

    timm's functions that give maps of tokens then refuse, for as long as tokens are reduced: a map
    of the tokens that are left would have another shape, and another place for each of them.

    Args:
        model: the model.
        blocks: its blocks.
        layers: layers that the new reduction needs, counted from 1.

    Raises:
        ValueError: the forward of such a layer was replaced by something that is not pcx's.
    """
    for layer in layers:
        if not isinstance(blocks[layer - 1].__dict__.get("forward"), StandIn | None):
            raise ValueError(
                f"model: something else stands in for layer {layer}'s forward; remove it first"
            )
    for old in found_on(model):
        old.remove()
    backbone = backbone_of(model)
    for name in _MAPS:
        if hasattr(backbone, name) and name not in backbone.__dict__:
            setattr(backbone, name, _Maps(backbone, name))


class _Maps:
    """Stands in for a backbone's function that gives maps of tokens; an object, to be copied."""

    def __init__(self, backbone: nn.Module, name: str):
        self.backbone, self.name = backbone, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if found_on(self.backbone):
            raise ValueError(
                f"model: {self.name} has no maps to give, since tokens are dropped or merged on "
                "the way; call remove() of what set that up first"
            )
        return getattr(type(self.backbone), self.name)(self.backbone, *args, **kwargs)
