"""Attention over [a prefix shared by samples; own keys], and its log-sum-exp.

One program computes a tile of queries of one head and sample. It keeps one online softmax, first
over the prefix's tiles, which all samples share and L2 holds, then over the sample's own
(FlashAttention-2, arXiv:2307.08691, with two sources of keys). There are no atomics, so every run
gives the same bits. On Hopper the kernels of csrc/cuda run most calls that fit their limits.

The arguments of all functions of this folder were checked by `pcx.ops.prefix_attention`:
    q [B, H, N, d]; k, v [B, H, S, d]; prefix_k, prefix_v [H, m, d] or [G, H, m, d]; index [B];
    lengths [G]; bias [B0 | 1, B1 | 1, H | 1, N | 1, S | 1] with B0 * B1 = B, additive or boolean.
A kernel gets the strides of a tensor as one tuple, of samples, heads and tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcx.kernels.launch import on_device, rowwise
from pcx.kernels.prefix_attention.blocks import bias_of, set_of, store
from pcx.kernels.prefix_attention.launch import (
    RUNTIME,
    Tiles,
    bias_arguments,
    configuration,
    dense,
    given,
    set_count,
    tail,
)
from pcx.kernels.prefix_attention.windows import forward_packed, packing_of
from pcx.kernels.tiles import LOG2_E, biased, head_of, parts, precision, set_strides, tile

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _attend(
    state, queries, source, bias, columns, limit, rows, N, factor,
    DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, MASKED: tl.constexpr,
    BIAS: tl.constexpr, GUARD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds one tile of keys to the online softmax of a tile of queries.

    `source` is (keys, values, their strides of tokens), `bias` (pointer, strides of rows, columns).
    """
    acc0, acc1, total, top = state
    q0, q1 = queries
    keys, values, stride_k, stride_v = source
    k0 = tile(keys, columns, stride_k, limit, DIM, 0, D0, MASKED)
    scores = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)  # [BM, BN]
    if D1 > 0:
        k1 = tile(keys, columns, stride_k, limit, DIM, D0, D1, MASKED)
        scores = tl.dot(q1, tl.trans(k1), acc=scores, input_precision=PRECISION)
    if BIAS > 0:
        scores = biased(
            scores * factor, bias[0], rows, columns, bias[1], bias[2], N, limit, BIAS == 2
        )
    if MASKED:
        scores = tl.where((columns < limit)[None, :], scores, float("-inf"))
    if BIAS > 0:
        new = tl.maximum(top, tl.max(scores, 1))
    else:  # the maximum before scaling: scaling and subtraction are then one instruction
        new = tl.maximum(top, tl.max(scores, 1) * factor)
    base = new
    if GUARD:  # for rows that attend to nothing so far
        base = tl.where(new == float("-inf"), 0.0, new)
    if BIAS > 0:
        weights = tl.exp2(scores - base[:, None])
    else:
        weights = tl.exp2(scores * factor - base[:, None])
    decay = tl.exp2(top - base)
    total = total * decay + tl.sum(weights, 1)
    v0 = tile(values, columns, stride_v, limit, DIM, 0, D0, MASKED)
    weights = weights.to(v0.dtype)
    acc0 = tl.dot(weights, v0, acc=acc0 * decay[:, None], input_precision=PRECISION)
    if D1 > 0:
        v1 = tile(values, columns, stride_v, limit, DIM, D0, D1, MASKED)
        acc1 = tl.dot(weights, v1, acc=acc1 * decay[:, None], input_precision=PRECISION)
    return acc0, acc1, total, new


@triton.jit
def _attend_to_all(
    q, stride_q, prefix, own, bias, valid, out, stride_out, lse, first, factor, N, S,
    DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PREFIX_TAIL: tl.constexpr, OWN_TAIL: tl.constexpr, RAGGED: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of BM rows of queries from `first`, over `valid` prefix keys and S own keys.

    `prefix` and `own` are sources, and `bias` is a bias, as `_attend` takes them.
    """
    rows = first + tl.arange(0, BM)
    q0 = tile(q, rows, stride_q, N, DIM, 0, D0, True)
    q1 = q0
    acc0 = tl.zeros([BM, D0], tl.float32)
    acc1 = acc0
    if D1 > 0:
        q1 = tile(q, rows, stride_q, N, DIM, D0, D1, True)
        acc1 = tl.zeros([BM, D1], tl.float32)
    total = tl.zeros([BM], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    steps = tl.arange(0, BN)

    if RAGGED:
        for start in tl.range(0, valid, BN):
            acc0, acc1, total, top = _attend(
                (acc0, acc1, total, top), (q0, q1), prefix, bias, start + steps, valid, rows, N,
                factor, DIM, D0, D1, True, 0, False, PRECISION,
            )  # fmt: skip
    else:
        whole = valid - valid % BN
        for start in tl.range(0, whole, BN):
            acc0, acc1, total, top = _attend(
                (acc0, acc1, total, top), (q0, q1), prefix, bias, start + steps, valid, rows, N,
                factor, DIM, D0, D1, False, 0, False, PRECISION,
            )  # fmt: skip
        if PREFIX_TAIL > 0:
            acc0, acc1, total, top = _attend(
                (acc0, acc1, total, top), (q0, q1), prefix, bias,
                whole + tl.arange(0, PREFIX_TAIL), valid, rows, N, factor,
                DIM, D0, D1, True, 0, False, PRECISION,
            )  # fmt: skip
    whole = S - S % BN
    for start in tl.range(0, whole, BN):
        acc0, acc1, total, top = _attend(
            (acc0, acc1, total, top), (q0, q1), own, bias, start + steps, S, rows, N, factor,
            DIM, D0, D1, False, BIAS, BIAS > 0, PRECISION,
        )  # fmt: skip
    if OWN_TAIL > 0:
        acc0, acc1, total, top = _attend(
            (acc0, acc1, total, top), (q0, q1), own, bias, whole + tl.arange(0, OWN_TAIL), S, rows,
            N, factor, DIM, D0, D1, True, BIAS, BIAS > 0, PRECISION,
        )  # fmt: skip

    denominator = total
    if BIAS > 0:  # a row that attends to nothing gives zeros, as SDPA does
        denominator = tl.where(total == 0.0, 1.0, total)
    inverse = (1.0 / denominator)[:, None]
    store(out, rows, stride_out, N, acc0 * inverse, DIM, 0, D0)
    if D1 > 0:
        store(out, rows, stride_out, N, acc1 * inverse, DIM, D0, D1)
    tl.store(lse + rows, (top + tl.log2(total)) * LN_2, mask=rows < N)


@triton.jit(do_not_specialize=RUNTIME)
def _forward(
    q, k, v, prefix_k, prefix_v, index, lengths, bias, out, lse, factor,
    q_strides, k_strides, v_strides, prefix_k_strides, prefix_v_strides, bias_strides,
    B, H, N, S, m, G, B1,
    DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PREFIX_TAIL: tl.constexpr, OWN_TAIL: tl.constexpr, INDEXED: tl.constexpr,
    RAGGED: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(N, BM)
    pid = tl.program_id(0)
    first = (pid % tiles) * BM
    h = (pid // tiles) % H
    b = pid // (tiles * H)
    b64 = b.to(tl.int64)
    chosen = set_of(b, index, G, INDEXED)
    q = head_of(q, b64, h, q_strides, DIM)
    k = head_of(k, b64, h, k_strides, DIM)
    v = head_of(v, b64, h, v_strides, DIM)
    prefix_k = head_of(prefix_k, chosen, h, prefix_k_strides, DIM)
    prefix_v = head_of(prefix_v, chosen, h, prefix_v_strides, DIM)
    bias = bias_of(bias, b64, h, B1, bias_strides)
    out += (b64 * N * H + h) * DIM  # [B, N, H, d]
    lse += (h.to(tl.int64) * B + b) * N
    valid = m
    if RAGGED:
        valid = tl.minimum(tl.load(lengths + chosen).to(tl.int32), m)
    _attend_to_all(
        q, q_strides[2], (prefix_k, prefix_v, prefix_k_strides[2], prefix_v_strides[2]),
        (k, v, k_strides[2], v_strides[2]), (bias, bias_strides[3], bias_strides[4]), valid,
        out, H * DIM, lse, first, factor, N, S,
        DIM, D0, D1, BM, BN, PREFIX_TAIL, OWN_TAIL, RAGGED, BIAS, PRECISION,
    )  # fmt: skip


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    index: Tensor | None,
    lengths: Tensor | None,
    bias: Tensor | None,
    scale: float,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """The output [B, H, N, d], in memory [B, N, H, d], and LSE [B, H, N], in memory [H, B, N].

    The LSE is float32. `tiles`, (queries, keys, warps, stages), replaces the shipped configuration.
    """
    batch, heads, n, dim = q.shape
    own, m = k.shape[2], prefix_k.shape[-2]
    out = q.new_empty(batch, n, heads, dim).transpose(1, 2)
    lse = q.new_empty(heads, batch, n, dtype=torch.float32).transpose(0, 1)
    if not out.numel():
        return out, lse
    index, lengths = dense(index), dense(lengths)
    q, k, v, prefix_k, prefix_v = map(rowwise, (q, k, v, prefix_k, prefix_v))
    pointer, bias_strides, inner_batch, kind = bias_arguments(bias, q)
    sets = lengths is not None or set_count(prefix_k) > 1
    packing = None if tiles else packing_of(q, own, m, sets, bias_strides, inner_batch, kind)
    if packing is not None:
        shared_bias = pointer, bias_strides, kind
        with on_device(q):
            forward_packed(packing, q, k, v, prefix_k, prefix_v, shared_bias, out, lse, scale)
        return out, lse
    bm, bn, warps, stages = tiles or configuration("forward", q, own)
    with on_device(q):
        _forward[(triton.cdiv(n, bm) * heads * batch,)](
            q, k, v, prefix_k, prefix_v, given(index, q), given(lengths, q), pointer,
            out, lse, scale * LOG2_E.value,
            q.stride()[:3], k.stride()[:3], v.stride()[:3], set_strides(prefix_k),
            set_strides(prefix_v), bias_strides,
            batch, heads, n, own, m, set_count(prefix_k), inner_batch,
            **parts(dim), BM=bm, BN=bn,
            PREFIX_TAIL=0 if lengths is not None else tail(m, bn), OWN_TAIL=tail(own, bn),
            INDEXED=index is not None, RAGGED=lengths is not None, BIAS=kind,
            PRECISION=precision(q), num_warps=warps, num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse
