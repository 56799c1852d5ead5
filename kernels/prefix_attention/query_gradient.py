"""The gradients of the queries and of a bias, and delta, which the gradients of keys use.

One program computes a tile of queries and loops over the prefix's keys and the sample's own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcx.kernels.launch import on_device
from pcx.kernels.prefix_attention.blocks import bias_of, set_of, store
from pcx.kernels.prefix_attention.launch import (
    RUNTIME,
    Tiles,
    bias_arguments,
    given,
    set_count,
    tail,
)
from pcx.kernels.tiles import LOG2_E, biased, head_of, parts, precision, set_strides, tile


@triton.jit
def _slopes(
    queries, gradients, source, bias, columns, limit, rows, N, lse, delta, factor,
    DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, MASKED: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dL/d(scale * q k) of a tile [BM, BN], and the tile of keys it came from.

    `source` is (keys, values, their strides of tokens), `bias` (pointer, strides of rows, columns).
    """
    keys, values, stride_k, stride_v = source
    k0 = tile(keys, columns, stride_k, limit, DIM, 0, D0, MASKED)
    k1 = k0
    scores = tl.dot(queries[0], tl.trans(k0), input_precision=PRECISION)
    if D1 > 0:
        k1 = tile(keys, columns, stride_k, limit, DIM, D0, D1, MASKED)
        scores = tl.dot(queries[1], tl.trans(k1), acc=scores, input_precision=PRECISION)
    scores *= factor
    if BIAS > 0:
        scores = biased(scores, bias[0], rows, columns, bias[1], bias[2], N, limit, BIAS == 2)
    weights = tl.exp2(scores - lse[:, None])
    if MASKED:
        weights = tl.where((columns < limit)[None, :], weights, 0.0)
    v0 = tile(values, columns, stride_v, limit, DIM, 0, D0, MASKED)
    inner = tl.dot(gradients[0], tl.trans(v0), input_precision=PRECISION)
    if D1 > 0:
        v1 = tile(values, columns, stride_v, limit, DIM, D0, D1, MASKED)
        inner = tl.dot(gradients[1], tl.trans(v1), acc=inner, input_precision=PRECISION)
    return weights * (inner - delta[:, None]), k0, k1


@triton.jit
def _add(
    acc, queries, gradients, source, bias, dbias, columns, limit, rows, N, lse, delta, factor,
    DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, MASKED: tl.constexpr,
    BIAS: tl.constexpr, NEED_DBIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the contribution of a tile of keys to the gradient of a tile of queries."""
    acc0, acc1 = acc
    slopes, k0, k1 = _slopes(
        queries, gradients, source, bias, columns, limit, rows, N, lse, delta, factor,
        DIM, D0, D1, MASKED, BIAS, PRECISION,
    )  # fmt: skip
    if NEED_DBIAS:
        inside = (rows < N)[:, None] & (columns < limit)[None, :]
        tl.store(dbias + rows[:, None] * limit + columns[None, :], slopes, mask=inside)
    slopes = slopes.to(k0.dtype)
    acc0 = tl.dot(slopes, k0, acc=acc0, input_precision=PRECISION)
    if D1 > 0:
        acc1 = tl.dot(slopes, k1, acc=acc1, input_precision=PRECISION)
    return acc0, acc1


@triton.jit(do_not_specialize=RUNTIME)
def _query_gradient(
    q, k, v, prefix_k, prefix_v, index, lengths, bias, out, lse, grad_out, grad_lse, delta, dq,
    dbias, factor, scale,
    q_strides, k_strides, v_strides, prefix_k_strides, prefix_v_strides, bias_strides,
    out_strides, grad_out_strides, grad_lse_strides,
    B, H, N, S, m, G, B1,
    DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PREFIX_TAIL: tl.constexpr, OWN_TAIL: tl.constexpr, INDEXED: tl.constexpr,
    RAGGED: tl.constexpr, BIAS: tl.constexpr, LSE_GRAD: tl.constexpr, NEED_DQ: tl.constexpr,
    NEED_DBIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes delta = rowsum(dO * O) - dLSE [H, B, N], dq [B, N, H, d] and dbias [B, H, N, S]."""
    tiles = tl.cdiv(N, BM)
    pid = tl.program_id(0)
    h = (pid // tiles) % H
    b = pid // (tiles * H)
    rows = (pid % tiles) * BM + tl.arange(0, BM)
    b64 = b.to(tl.int64)
    out = head_of(out, b64, h, out_strides, DIM)
    grad_out = head_of(grad_out, b64, h, grad_out_strides, DIM)
    row_base = (h.to(tl.int64) * B + b) * N

    o0 = tile(out, rows, out_strides[2], N, DIM, 0, D0, True)
    g0 = tile(grad_out, rows, grad_out_strides[2], N, DIM, 0, D0, True)
    g1 = g0
    sums = tl.sum(o0.to(tl.float32) * g0.to(tl.float32), 1)
    if D1 > 0:
        o1 = tile(out, rows, out_strides[2], N, DIM, D0, D1, True)
        g1 = tile(grad_out, rows, grad_out_strides[2], N, DIM, D0, D1, True)
        sums += tl.sum(o1.to(tl.float32) * g1.to(tl.float32), 1)
    if LSE_GRAD:
        grad_lse = head_of(grad_lse, b64, h, grad_lse_strides, 1)
        sums -= tl.load(grad_lse + rows * grad_lse_strides[2], mask=rows < N, other=0.0)
    tl.store(delta + row_base + rows, sums, mask=rows < N)

    if NEED_DQ:
        normaliser = tl.load(lse + row_base + rows, mask=rows < N, other=float("inf")) * LOG2_E
        # a row that attends to nothing has no gradient
        normaliser = tl.where(normaliser == float("-inf"), float("inf"), normaliser)
        chosen = set_of(b, index, G, INDEXED)
        q = head_of(q, b64, h, q_strides, DIM)
        k = head_of(k, b64, h, k_strides, DIM)
        v = head_of(v, b64, h, v_strides, DIM)
        prefix_k = head_of(prefix_k, chosen, h, prefix_k_strides, DIM)
        prefix_v = head_of(prefix_v, chosen, h, prefix_v_strides, DIM)
        bias = bias_of(bias, b64, h, B1, bias_strides)
        prefix = (prefix_k, prefix_v, prefix_k_strides[2], prefix_v_strides[2])
        own = (k, v, k_strides[2], v_strides[2])
        added = (bias, bias_strides[3], bias_strides[4])
        q0 = tile(q, rows, q_strides[2], N, DIM, 0, D0, True)
        q1 = q0
        acc0 = tl.zeros([BM, D0], tl.float32)
        acc1 = acc0
        if D1 > 0:
            q1 = tile(q, rows, q_strides[2], N, DIM, D0, D1, True)
            acc1 = tl.zeros([BM, D1], tl.float32)
        steps = tl.arange(0, BN)
        if RAGGED:
            valid = tl.minimum(tl.load(lengths + chosen).to(tl.int32), m)
            for start in tl.range(0, valid, BN):
                acc0, acc1 = _add(
                    (acc0, acc1), (q0, q1), (g0, g1), prefix, added, dbias, start + steps, valid,
                    rows, N, normaliser, sums, factor, DIM, D0, D1, True, 0, False, PRECISION,
                )  # fmt: skip
        else:
            whole = m - m % BN
            for start in tl.range(0, whole, BN):
                acc0, acc1 = _add(
                    (acc0, acc1), (q0, q1), (g0, g1), prefix, added, dbias, start + steps, m,
                    rows, N, normaliser, sums, factor, DIM, D0, D1, False, 0, False, PRECISION,
                )  # fmt: skip
            if PREFIX_TAIL > 0:
                acc0, acc1 = _add(
                    (acc0, acc1), (q0, q1), (g0, g1), prefix, added, dbias,
                    whole + tl.arange(0, PREFIX_TAIL), m, rows, N, normaliser, sums, factor,
                    DIM, D0, D1, True, 0, False, PRECISION,
                )  # fmt: skip
        dbias += (b64 * H + h) * N * S
        whole = S - S % BN
        for start in tl.range(0, whole, BN):
            acc0, acc1 = _add(
                (acc0, acc1), (q0, q1), (g0, g1), own, added, dbias, start + steps, S, rows, N,
                normaliser, sums, factor, DIM, D0, D1, False, BIAS, NEED_DBIAS, PRECISION,
            )  # fmt: skip
        if OWN_TAIL > 0:
            acc0, acc1 = _add(
                (acc0, acc1), (q0, q1), (g0, g1), own, added, dbias,
                whole + tl.arange(0, OWN_TAIL), S, rows, N, normaliser, sums, factor,
                DIM, D0, D1, True, BIAS, NEED_DBIAS, PRECISION,
            )  # fmt: skip
        dq += (b64 * N * H + h) * DIM
        store(dq, rows, H * DIM, N, acc0 * scale, DIM, 0, D0)
        if D1 > 0:
            store(dq, rows, H * DIM, N, acc1 * scale, DIM, D0, D1)


def query_gradient(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    index: Tensor | None,
    lengths: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    need_q: bool,
    need_bias: bool,
    config: Tiles,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """dq, delta = rowsum(dO * O) - dLSE [B, H, N] (in memory [H, B, N]), and dbias."""
    batch, heads, n, dim = q.shape
    own, m = k.shape[2], prefix_k.shape[-2]
    delta = q.new_empty(heads, batch, n, dtype=torch.float32).transpose(0, 1)
    # The kernel of dq computes the bias's gradient too, and needs a place for dq even if unwanted.
    dq = q.new_empty(batch, n, heads, dim).transpose(1, 2) if need_q or need_bias else None
    dbias = q.new_empty(batch, heads, n, own, dtype=torch.float32) if need_bias else None
    bm, bn, warps, stages = config
    pointer, bias_strides, inner_batch, kind = bias_arguments(bias, q)
    grad_of_lse = given(grad_lse, lse)
    if q.numel():
        with on_device(q):
            _query_gradient[(triton.cdiv(n, bm) * heads * batch,)](
                q, k, v, prefix_k, prefix_v, given(index, q), given(lengths, q), pointer,
                out, lse, grad_out, grad_of_lse, delta, given(dq, delta), given(dbias, delta),
                scale * LOG2_E.value, scale,
                q.stride()[:3], k.stride()[:3], v.stride()[:3], set_strides(prefix_k),
                set_strides(prefix_v), bias_strides, out.stride()[:3], grad_out.stride()[:3],
                grad_of_lse.stride(),
                batch, heads, n, own, m, set_count(prefix_k), inner_batch,
                **parts(dim), BM=bm, BN=bn,
                PREFIX_TAIL=0 if lengths is not None else tail(m, bn), OWN_TAIL=tail(own, bn),
                INDEXED=index is not None, RAGGED=lengths is not None, BIAS=kind,
                LSE_GRAD=grad_lse is not None, NEED_DQ=need_q or need_bias, NEED_DBIAS=need_bias,
                PRECISION=precision(q), num_warps=warps, num_stages=stages, enable_fp_fusion=True,
            )  # fmt: skip
    return dq if need_q else None, delta, dbias
