"""The gradient of a linear map among a few channels of rows, and of the LayerNorm behind it.

One program computes a few rows. First it adds the gradient through the norm to that of x, then it
sends the channels back through the matrix. As in the forward kernel, barriers stand between steps
that read what the step before has written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcx.kernels.launch import on_device


@triton.jit
def _gradient(
    grad_x, grad_normed, index, weight, x, mean, rstd, norm_weight, by_x, part,
    scale, rows, dim, count,
    BM: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, NORM: tl.constexpr, SUM: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    real = (row < rows)[:, None]
    start, place = row[:, None] * dim, row[:, None] * count
    centre = tl.zeros([BM], tl.float32)
    inverse, first_mean, second_mean = centre, centre, centre
    if NORM:  # the two means of the LayerNorm's backward pass
        centre = tl.load(mean + row, mask=row < rows, other=0.0).to(tl.float32)
        inverse = tl.load(rstd + row, mask=row < rows, other=0.0).to(tl.float32)
        for first in range(0, dim, BD):
            columns = (first + tl.arange(0, BD))[None, :]
            inside = real & (columns < dim)
            g = tl.load(grad_normed + start + columns, mask=inside, other=0.0).to(tl.float32)
            if SCALED:
                factor = tl.load(norm_weight + columns, mask=columns < dim, other=0.0)
                g *= factor.to(tl.float32)
            values = tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32)
            first_mean += tl.sum(g, 1)
            second_mean += tl.sum(g * (values - centre[:, None]) * inverse[:, None], 1)
        first_mean /= dim
        second_mean /= dim
    for first in range(0, dim, BD):
        columns = (first + tl.arange(0, BD))[None, :]
        inside = real & (columns < dim)
        total = tl.zeros([BM, BD], tl.float32)
        if NORM:
            g = tl.load(grad_normed + start + columns, mask=inside, other=0.0).to(tl.float32)
            if SCALED:
                factor = tl.load(norm_weight + columns, mask=columns < dim, other=0.0)
                g *= factor.to(tl.float32)
            values = tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32)
            values = (values - centre[:, None]) * inverse[:, None]
            total += (g - first_mean[:, None] - values * second_mean[:, None]) * inverse[:, None]
        if SUM:
            total += tl.load(grad_x + start + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(by_x + start + columns, total, mask=inside)
    tl.debug_barrier()
    for first in range(0, count, BK):
        channels = first + tl.arange(0, BK)
        chosen = tl.load(index + channels, mask=channels < count, other=0)
        inside = real & (channels < count)[None, :]
        own = tl.load(by_x + start + chosen[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(part + place + channels[None, :], own * scale, mask=inside)
    tl.debug_barrier()
    for first in range(0, count, BK):
        inputs = first + tl.arange(0, BK)
        added = tl.zeros([BM, BK], tl.float32)
        for begin in range(0, count, BK):
            outputs = begin + tl.arange(0, BK)
            inside = real & (outputs < count)[None, :]
            own = tl.load(part + place + outputs[None, :], mask=inside, other=0.0)
            inside = (outputs < count)[:, None] & (inputs < count)[None, :]
            matrix = tl.load(
                weight + outputs[:, None] * count + inputs[None, :], mask=inside, other=0.0
            )
            added = tl.dot(own, matrix.to(own.dtype), acc=added, input_precision="ieee")
        chosen = tl.load(index + inputs, mask=inputs < count, other=0)
        inside = real & (inputs < count)[None, :]
        pointers = by_x + start + chosen[None, :]
        old = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        tl.store(pointers, old + added, mask=inside)


def row_gradients(
    grad_x: Tensor | None,
    grad_normed: Tensor | None,
    index: Tensor,
    weight: Tensor,
    scale: float,
    x: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    norm_weight: Tensor | None,
    product: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Arguments and results are those of the reference."""
    like = grad_x if x is None else x
    assert like is not None
    dim, count, has_norm = like.shape[-1], index.shape[0], grad_normed is not None
    by_x = like.new_empty(like.shape)
    part = like.new_empty(*like.shape[:-1], count, dtype=product)
    rows = like.numel() // dim
    if rows:
        of_norm = (x, mean, rstd, norm_weight) if has_norm else (None,) * 4
        given = (grad_x, grad_normed, index, weight, *of_norm)
        dense = [by_x if t is None else t.contiguous() for t in given]
        few = 16 if rows <= 4096 else 32
        with on_device(by_x):
            _gradient[(triton.cdiv(rows, few),)](
                *dense, by_x, part, scale, rows, dim, count,
                BM=few, BK=min(32, max(16, triton.next_power_of_2(count))),
                BD=min(128, triton.next_power_of_2(dim)), NORM=has_norm, SUM=grad_x is not None,
                SCALED=has_norm and norm_weight is not None, num_warps=few // 4, num_stages=2,
                enable_fp_fusion=True,
            )  # fmt: skip
    return by_x, part
