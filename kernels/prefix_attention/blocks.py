"""Blocks of rows, read and written in the same way by all kernels of prefix_attention."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def bias_of(bias, b, h, B1, strides):
    """The offset of head h of sample b in the bias [B0, B1, H, N, S]."""
    return bias + ((b // B1) * strides[0] + (b % B1) * strides[1] + h * strides[2])


@triton.jit
def set_of(b, index, G, INDEXED: tl.constexpr):
    """The prefix set of a sample. An index out of range is clamped here and asserted elsewhere."""
    chosen = b
    if INDEXED:
        chosen = tl.minimum(tl.maximum(tl.load(index + b), 0), G - 1)
    return chosen.to(tl.int64)


@triton.jit
def rows_at(pointer, offsets, inside, DIM: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr,
            MASKED: tl.constexpr):  # fmt: skip
    """Loads [rows, WIDTH] of rows that begin anywhere; zeros outside of them."""
    columns = FIRST + tl.arange(0, WIDTH)
    offsets = offsets[:, None]
    if DIM % 8 == 0:  # see `head_of`
        offsets = tl.multiple_of(offsets, [8, 8])
    pointers = pointer + offsets + columns[None, :]
    if MASKED:
        values = tl.load(pointers, mask=inside[:, None] & (columns < DIM)[None, :], other=0.0)
    elif FIRST + WIDTH > DIM:
        values = tl.load(pointers, mask=(columns < DIM)[None, :], other=0.0)
    else:
        values = tl.load(pointers)
    return values


@triton.jit
def store(pointer, rows, stride, limit, values, DIM: tl.constexpr, FIRST: tl.constexpr,
          WIDTH: tl.constexpr):  # fmt: skip
    """The counterpart of `tile`: writes the rows and columns of [rows, WIDTH] that exist."""
    columns = FIRST + tl.arange(0, WIDTH)
    inside = (rows < limit)[:, None]
    if FIRST + WIDTH > DIM:
        inside = inside & (columns < DIM)[None, :]
    offsets = rows[:, None] * stride
    if DIM % 8 == 0:  # see `head_of`
        offsets = tl.multiple_of(offsets, [8, 8])
    pointers = pointer + offsets + columns[None, :]
    tl.store(pointers, values.to(pointer.dtype.element_ty), mask=inside)
