"""The bias of `pcx.prefix_attention`, which may be the same along neighbouring batch dimensions."""

from __future__ import annotations

import torch
from torch import Tensor


def five_dimensions(bias: Tensor, lead: torch.Size) -> Tensor:
    """The bias as [B0 | 1, B1 | 1, H | 1, N | 1, S | 1], for a batch of B0 * B1 samples.

    A bias may be the same along some neighbouring batch dimensions, as Swin's is for all images of
    a batch of windows. It is not expanded along these.
    """
    bias = bias.reshape((1,) * (len(lead) + 3 - bias.dim()) + bias.shape)
    own = bias.shape[:-3]
    front = next((i for i, size in enumerate(own) if size > 1), len(own))
    if tuple(own[front:]) == tuple(lead[front:]):  # the same along the first dimensions
        return bias.flatten(0, -4)[None]
    back = next((i for i in reversed(range(len(own))) if own[i] > 1), -1) + 1
    if tuple(own[:back]) == tuple(lead[:back]):  # the same along the last
        return bias.flatten(0, -4)[:, None]
    return bias.expand(*lead, *bias.shape[-3:]).flatten(0, -4)[:, None]


def four_dimensions(bias: Tensor, batch: int) -> Tensor:
    """A bias [B0 | 1, B1 | 1, H | 1, N | 1, S | 1] as one that broadcasts to [B, H, N, S]."""
    outer, inner = batches_of(bias, batch)
    if bias.shape[:2] == (1, 1):
        return bias[0]
    return bias.expand(outer, inner, *bias.shape[2:]).flatten(0, 1)


def batches_of(bias: Tensor, batch: int) -> tuple[int, int]:
    """(B0, B1) of a bias [B0 | 1, B1 | 1, H | 1, N | 1, S | 1] for a batch of B0 * B1."""
    inner = bias.shape[1] if bias.shape[1] > 1 else batch // bias.shape[0]
    return (batch // inner if inner else bias.shape[0]), inner  # inner is 0 for no samples


def widened(bias: Tensor, start: int, width: int, tokens: int) -> Tensor:
    """A bias made for the tokens without prompts, neutral on the prompts' rows and columns."""
    if bias.shape[-1] != tokens:
        bias = _pad(bias, start, width)
    if bias.shape[-2] not in (1, tokens):
        bias = _pad(bias.transpose(-2, -1), start, width).transpose(-2, -1)
    return bias


def _pad(bias: Tensor, start: int, width: int) -> Tensor:
    """Puts `width` columns that change nothing at `start` of the last dimension."""
    if bias.shape[-1] == 1 or width == 0:
        return bias
    neutral = bias.new_full((*bias.shape[:-1], width), bias.dtype == torch.bool)
    return torch.cat([bias[..., :start], neutral, bias[..., start:]], -1)
