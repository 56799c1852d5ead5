"""Tiles of heads' rows, read in the same way by all Triton kernels over queries and keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(-3.4028234663852886e38)  # the least finite float32


@triton.jit
def head_of(pointer, b, h, strides, DIM: tl.constexpr):
    """Where head h of sample b begins; strides are those of samples, heads and tokens.

    Triton knows a stride as a multiple of 16 or of 1. `rowwise` lays rows of DIM columns on
    multiples of 8 elements where DIM is one. Saying so lets loads take 16 bytes at head dims such
    as 72 and 88. DIM is 1 for other tensors.
    """
    offset = b * strides[0] + h * strides[1]
    if DIM % 8 == 0:
        offset = offset // 8 * 8  # a hint would get lost where one of the sum's terms is 0
    return pointer + offset


@triton.jit
def tile(
    pointer,
    rows,
    stride,
    limit,
    DIM: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Loads [rows, WIDTH] of a matrix of DIM columns, from column FIRST; zeros outside of it."""
    columns = FIRST + tl.arange(0, WIDTH)
    offsets = rows[:, None] * stride
    if DIM % 8 == 0:  # see `head_of`
        offsets = tl.multiple_of(offsets, [8, 8])
    pointers = pointer + offsets + columns[None, :]
    if MASKED:
        inside = (rows < limit)[:, None] & (columns < DIM)[None, :]
        values = tl.load(pointers, mask=inside, other=0.0)
    elif FIRST + WIDTH > DIM:
        values = tl.load(pointers, mask=(columns < DIM)[None, :], other=0.0)
    else:
        values = tl.load(pointers)
    return values


@triton.jit
def biased(scores, bias, rows, columns, stride_n, stride_s, N, S, BOOLEAN: tl.constexpr):
    """Adds a bias [N, S] to scores in units of log2, or masks them if it is BOOLEAN."""
    inside = (rows < N)[:, None] & (columns < S)[None, :]
    pointers = bias + rows[:, None] * stride_n + columns[None, :] * stride_s
    if BOOLEAN:
        attends = tl.load(pointers, mask=inside, other=1)
        scores = tl.where(attends != 0, scores, float("-inf"))
    else:
        added = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        # The least finite number, by which some mask, stays finite in units of log2.
        scores += tl.where(added > float("-inf"), tl.maximum(added * LOG2_E, LEAST), added)
    return scores


def parts(dim: int) -> dict[str, int]:
    """Splits the head dim into a power of two and a rest padded to one: 80 = 64 + 16."""
    first = max(16, 1 << (dim.bit_length() - 1))
    rest = dim - first
    return {"DIM": dim, "D0": first, "D1": max(16, triton.next_power_of_2(rest)) if rest > 0 else 0}


def set_strides(x: Tensor) -> tuple[int, ...]:
    return x.stride()[:3] if x.dim() == 4 else (0, *x.stride()[:2])


def precision(q: Tensor) -> str:
    """The precision of float32 products that torch is set to."""
    setting = torch.backends.cuda.matmul.fp32_precision
    if setting == "none":
        setting = torch.backends.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if q.is_cuda and setting == "tf32" else "ieee"
