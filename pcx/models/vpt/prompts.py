"""Prompts of a VPT: how they are drawn, dropped in training, and shared by samples."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcx.arguments import whole_number
from pcx.backbones.probing import BlockSpec
from pcx.backbones.spec import BackboneSpec
from pcx.models.heads import trained_dtype

MOST_PROMPTS = 1_000_000  # in a layer: more would fill any memory


def counts_per_layer(num_prompts: Any, depth: int, kind: str, layers: Any = None) -> list[int]:
    """The number of prompts in each layer.

    Args:
        num_prompts: one number, or one for each layer.
        depth: of the backbone.
        kind: "deep", "shallow" or "prefix".
        layers: which layers have prompts: a slice, or k for the first k and -k for the last; None
            is all.

    Raises:
        ValueError: `num_prompts` is neither a whole number nor one per layer, or does not fit.
    """
    one = isinstance(num_prompts, str | bytes) or not isinstance(num_prompts, Iterable)
    given = [num_prompts] * depth if one else list(num_prompts)
    counts = [whole_number("num_prompts", m, most=MOST_PROMPTS) for m in given]
    if one and kind == "shallow":
        counts[1:] = [0] * (depth - 1)
    if len(counts) != depth:
        raise ValueError(f"num_prompts: {len(counts)} counts for a backbone of {depth} blocks")
    if kind == "shallow" and any(counts[1:]):
        raise ValueError(f"num_prompts: {counts}; kind='shallow' has prompts in layer 0 only")
    if layers is not None:
        chosen = _chosen(layers, depth, kind)
        counts = [m if i in chosen else 0 for i, m in enumerate(counts)]
    return counts


def _chosen(layers: Any, depth: int, kind: str) -> range:
    if kind == "shallow":
        raise ValueError(f"depth: {layers!r}, and kind='shallow' has prompts in layer 0 only")
    if not isinstance(layers, slice):
        count = whole_number("depth", layers, -depth, depth)
        layers = slice(count) if count >= 0 else slice(count, None)
    chosen = range(depth)[layers]
    if not chosen:
        raise ValueError(f"depth: {layers!r} of {depth} layers leaves none with prompts")
    return chosen


def draw_prompts(
    m: int,
    block: BlockSpec,
    spec: BackboneSpec,
    kind: str,
    like: Tensor,
    width: int | None = None,
) -> nn.Parameter:
    """Draws a layer's prompts as published: U(-v, v), v = sqrt(6 / (3 * patch height * width + D)).

    D is the first layer's width for all layers, of hierarchical backbones too. Prompts are float32
    where `like` has 16 bits. `width` stands for D where a map makes prompts of them.

    Returns:
        [m, D], or [2, m, H*d] of kind "prefix".

    Raises:
        ValueError: the kind is "prefix" and a block's keys and values are not alike.
    """
    bound = math.sqrt(6 / ((spec.patch_elements or 0) + (width or spec.blocks[0].dim)))
    shape: tuple[int, ...] = (m, width or block.dim)
    if kind == "prefix":
        if block.calls != 1 or block.head_dim != block.value_dim:
            raise ValueError("kind: 'prefix' needs one attention call per block with d = dv")
        shape = (2, m, block.heads * block.head_dim)
    empty = torch.empty(shape, device=like.device, dtype=trained_dtype(like.dtype))
    return prompt_parameter(empty.uniform_(-bound, bound))


def prompt_parameter(values: Tensor, *, trained: bool = True) -> nn.Parameter:
    """A parameter, frozen where it holds no prompts: DDP would wait for its gradient."""
    return nn.Parameter(values, requires_grad=trained and values.numel() > 0)


def dropped(prompts: Tensor, share: float, groups: int | None, batch: int) -> Tensor:
    """Prompts after dropout, one set per sample or per group of samples: [G, *prompts]."""
    count = min(groups or batch, batch)
    return F.dropout(prompts.expand(count, *prompts.shape), share)


def neighbours(x: Tensor, rank: int, batch: int) -> Tensor | None:
    """The set of each sample where a tensor of `rank` holds G sets for G parts of the batch."""
    if x.dim() < rank or x.shape[0] == batch:
        return None
    return torch.arange(batch, device=x.device) * x.shape[0] // max(batch, 1)


def per_sample(x: Tensor, sets: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Each sample's prompts, expanded or chosen by its set."""
    return x.expand(shape) if sets is None else x[sets]


class Chosen:
    """Which of several prefix sets each sample of the forward under way has, for all its blocks.

    Attributes:
        sets: [B], whole numbers.
    """

    sets: Tensor | None = None
