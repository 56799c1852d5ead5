"""A linear map among a few channels of rows, in place, and the LayerNorm behind it.

One program computes a few rows. Its steps read what the step before has written, so that barriers
stand between them: the channels u, the product, the norm. u goes through memory of its own, since
the product overwrites x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcx.kernels.launch import on_device


@triton.jit
def _salient(
    x, index, weight, bias, norm_weight, norm_bias, u, normed, mean, rstd,
    scale, eps, rows, dim, count,
    BM: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, NORM: tl.constexpr,
    SCALED: tl.constexpr, SHIFTED: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    real = (row < rows)[:, None]
    x_rows, u_rows = x + row[:, None] * dim, u + row[:, None] * count
    for first in range(0, count, BK):
        channels = first + tl.arange(0, BK)
        chosen = tl.load(index + channels, mask=channels < count, other=0)
        inside = real & (channels < count)[None, :]
        part = tl.load(x_rows + chosen[None, :], mask=inside, other=0.0)
        tl.store(u_rows + channels[None, :], part, mask=inside)
    tl.debug_barrier()
    for first in range(0, count, BK):
        outputs = first + tl.arange(0, BK)
        delta = tl.zeros([BM, BK], tl.float32)
        for start in range(0, count, BK):
            channels = start + tl.arange(0, BK)
            inside = real & (channels < count)[None, :]
            part = tl.load(u_rows + channels[None, :], mask=inside, other=0.0)
            places = outputs[None, :] * count + channels[:, None]  # of W transposed
            inside = (channels < count)[:, None] & (outputs < count)[None, :]
            matrix = tl.load(weight + places, mask=inside, other=0.0).to(part.dtype)
            delta = tl.dot(part, matrix, acc=delta, input_precision="ieee")
        shift = tl.load(bias + outputs, mask=outputs < count, other=0.0)
        delta = (delta + shift.to(u.dtype.element_ty).to(tl.float32)[None, :]) * scale
        chosen = tl.load(index + outputs, mask=outputs < count, other=0)
        inside = real & (outputs < count)[None, :]
        old = tl.load(x_rows + chosen[None, :], mask=inside, other=0.0).to(tl.float32)
        delta = delta.to(x.dtype.element_ty).to(tl.float32)
        tl.store(x_rows + chosen[None, :], old + delta, mask=inside)
    if NORM:
        tl.debug_barrier()
        total = tl.zeros([BM], tl.float32)
        for first in range(0, dim, BD):
            columns = (first + tl.arange(0, BD))[None, :]
            inside = real & (columns < dim)
            total += tl.sum(tl.load(x_rows + columns, mask=inside, other=0.0).to(tl.float32), 1)
        centre = total / dim
        squares = tl.zeros([BM], tl.float32)
        for first in range(0, dim, BD):
            columns = (first + tl.arange(0, BD))[None, :]
            inside = real & (columns < dim)
            values = tl.load(x_rows + columns, mask=inside, other=0.0).to(tl.float32)
            values = tl.where(inside, values - centre[:, None], 0.0)
            squares += tl.sum(values * values, 1)
        inverse = 1.0 / tl.sqrt(squares / dim + eps)
        if KEEP:
            tl.store(mean + row, centre, mask=row < rows)
            tl.store(rstd + row, inverse, mask=row < rows)
        for first in range(0, dim, BD):
            columns = (first + tl.arange(0, BD))[None, :]
            inside = real & (columns < dim)
            values = tl.load(x_rows + columns, mask=inside, other=0.0).to(tl.float32)
            values = (values - centre[:, None]) * inverse[:, None]
            if SCALED:
                factor = tl.load(norm_weight + columns, mask=columns < dim, other=0.0)
                values *= factor.to(tl.float32)
            if SHIFTED:
                values += tl.load(norm_bias + columns, mask=columns < dim, other=0.0).to(tl.float32)
            tl.store(normed + row[:, None] * dim + columns, values, mask=inside)


def salient_linear(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: float,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
    product: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Changes x, which is dense; arguments and results are those of the reference."""
    lead, dim, count = x.shape[:-1], x.shape[-1], index.shape[0]
    has_norm = dtype is not None
    normed = x.new_empty(x.shape if has_norm else (0,), dtype=dtype or x.dtype)
    u = x.new_empty(*lead, count, dtype=product)
    statistics = (*lead, 1) if keep and has_norm else (0,)
    mean, rstd = (x.new_empty(statistics, dtype=torch.float32) for _ in range(2))
    rows = x.numel() // dim
    if rows:
        given = (index, weight, bias, norm_weight, norm_bias)
        dense = [x if t is None else t.contiguous() for t in given]
        few = 16 if rows <= 4096 else 32
        with on_device(x):
            _salient[(triton.cdiv(rows, few),)](
                x, *dense, u, normed, mean, rstd, scale, eps, rows, dim, count,
                BM=few, BK=min(32, max(16, triton.next_power_of_2(count))),
                BD=min(128, triton.next_power_of_2(dim)), NORM=has_norm,
                SCALED=norm_weight is not None, SHIFTED=norm_bias is not None,
                KEEP=keep and has_norm, num_warps=few // 4,
                num_stages=2 if product == torch.float32 else 1,
                enable_fp_fusion=True,
            )  # fmt: skip
    return normed, (u if keep else x.new_empty(0, dtype=product)), mean, rstd
