"""The gradient of a loss by the attention logits of a prefix, for `pcx.ops.logit_gate`.

One program computes a tile of the prefix's keys of one head and sample, and loops over the queries.
There are no atomics, so every run gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcx.kernels.launch import on_device, rowwise
from pcx.kernels.tiles import LOG2_E, head_of, parts, precision, set_strides, tile


@triton.jit(do_not_specialize=["N", "m"])
def _logit_gradient(
    q, keys, values, out, grad_out, lse, slopes, factor,
    q_strides, key_strides, value_strides, out_strides, grad_out_strides, lse_strides, H, N, m,
    DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    keys = head_of(keys, b, h, key_strides, DIM)
    values = head_of(values, b, h, value_strides, DIM)
    q = head_of(q, b, h, q_strides, DIM)
    out = head_of(out, b, h, out_strides, DIM)
    grad_out = head_of(grad_out, b, h, grad_out_strides, DIM)
    lse = head_of(lse, b, h, lse_strides, 1)
    k0 = tile(keys, columns, key_strides[2], m, DIM, 0, D0, True)
    v0 = tile(values, columns, value_strides[2], m, DIM, 0, D0, True)
    k1, v1 = k0, v0
    if D1 > 0:
        k1 = tile(keys, columns, key_strides[2], m, DIM, D0, D1, True)
        v1 = tile(values, columns, value_strides[2], m, DIM, D0, D1, True)
    total = tl.zeros([BN], tl.float32)
    for start in tl.range(0, N, BM):
        rows = start + tl.arange(0, BM)
        q0 = tile(q, rows, q_strides[2], N, DIM, 0, D0, True)
        g0 = tile(grad_out, rows, grad_out_strides[2], N, DIM, 0, D0, True)
        o0 = tile(out, rows, out_strides[2], N, DIM, 0, D0, True)
        delta = tl.sum(g0.to(tl.float32) * o0.to(tl.float32), 1)
        logits = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)  # [BM, BN]
        inner = tl.dot(g0, tl.trans(v0), input_precision=PRECISION)
        if D1 > 0:
            q1 = tile(q, rows, q_strides[2], N, DIM, D0, D1, True)
            g1 = tile(grad_out, rows, grad_out_strides[2], N, DIM, D0, D1, True)
            o1 = tile(out, rows, out_strides[2], N, DIM, D0, D1, True)
            delta += tl.sum(g1.to(tl.float32) * o1.to(tl.float32), 1)
            logits = tl.dot(q1, tl.trans(k1), acc=logits, input_precision=PRECISION)
            inner = tl.dot(g1, tl.trans(v1), acc=inner, input_precision=PRECISION)
        normaliser = (
            tl.load(lse + rows * lse_strides[2], mask=rows < N, other=float("inf")) * LOG2_E
        )
        # A row that attends to nothing has weights of 0.
        normaliser = tl.where(normaliser == float("-inf"), float("inf"), normaliser)
        weights = tl.exp2(logits * factor - normaliser[:, None])
        total += tl.sum(weights * (inner - delta[:, None]), 0)
    place = slopes + tl.program_id(0).to(tl.int64) * m + columns
    tl.store(place, total, mask=columns < m)


def prefix_logit_gradient(
    grad_out: Tensor,
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> Tensor:
    """The gradient [B, H, m] float32; arguments are those of `pcx.ops.reference.logit_gate`."""
    batch, heads, n, dim = q.shape
    m = prefix_k.shape[-2]
    slopes = q.new_empty(batch, heads, m, dtype=torch.float32)
    if not slopes.numel():
        return slopes
    q, prefix_k, prefix_v, out, grad_out = map(rowwise, (q, prefix_k, prefix_v, out, grad_out))
    width = min(64, max(16, triton.next_power_of_2(m)))
    with on_device(q):
        _logit_gradient[(batch * heads, triton.cdiv(m, width))](
            q, prefix_k, prefix_v, out, grad_out, lse, slopes, scale * LOG2_E.value,
            q.stride()[:3], set_strides(prefix_k), set_strides(prefix_v), out.stride()[:3],
            grad_out.stride()[:3], lse.stride(), heads, n, m,
            **parts(dim), BM=32, BN=width, PRECISION=precision(q), num_warps=4, num_stages=2,
            enable_fp_fusion=True,
        )  # fmt: skip
    return slopes
