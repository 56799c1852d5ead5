"""Attention over [a prefix shared by samples; own keys], forward and backward.

Forward: one program per (sample, head, tile of queries) keeps one online softmax over the prefix's
tiles, which every sample shares and L2 holds, and then over the sample's own (FlashAttention-2,
arXiv:2307.08691, with two sources of keys). Backward: one program per tile of queries gives dq, one
per tile of keys gives dk and dv. A sample's own keys are a prefix that it alone uses, so the same
kernel gives both; the rows of all samples that share a prefix are folded into one axis, cut into
chunks whose partial sums are added in a fixed order. No atomics: the same bits on every run. On
Hopper the kernels of csrc/cuda stand in for most of this where they fit.

All functions take what `pcx.ops.prefix_attention` has checked:
    q [B, H, N, d]; k, v [B, H, S, d]; prefix_k, prefix_v [H, m, d] or [G, H, m, d]; index [B];
    lengths [G]; bias [B0 | 1, B1 | 1, H | 1, N | 1, S | 1] with B0 * B1 = B, additive or boolean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcx.kernels.launch import on_device, products_of_warps, rowwise
from pcx.kernels.tiles import LOG2_E, biased, parts, precision, set_strides, tile
from pcx.ops.backends import processors

LN_2 = tl.constexpr(0.6931471805599453)
# Vary from call to call: one compiled form for all.
RUNTIME = ["N", "S", "m", "B1", "rows_per_chunk"]


@triton.jit
def _store(
    pointer,
    rows,
    stride,
    limit,
    values,
    DIM: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The counterpart of `tile`."""
    columns = FIRST + tl.arange(0, WIDTH)
    inside = (rows < limit)[:, None]
    if FIRST + WIDTH > DIM:
        inside = inside & (columns < DIM)[None, :]
    pointers = pointer + rows[:, None] * stride + columns[None, :]
    tl.store(pointers, values.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _set_of(b, index, G, INDEXED: tl.constexpr):
    """The prefix set of a sample; an index out of range, asserted elsewhere, is clamped."""
    chosen = b
    if INDEXED:
        chosen = tl.minimum(tl.maximum(tl.load(index + b), 0), G - 1)
    return chosen.to(tl.int64)


@triton.jit
def _attend(
    state,
    queries,
    keys,
    values,
    bias,
    columns,
    limit,
    rows,
    N,
    factor,
    stride_k,
    stride_v,
    stride_bn,
    stride_bs,
    DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    MASKED: tl.constexpr,
    BIAS: tl.constexpr,
    GUARD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds one tile of keys to the online softmax of a tile of queries."""
    acc0, acc1, total, top = state
    q0, q1 = queries
    k0 = tile(keys, columns, stride_k, limit, DIM, 0, D0, MASKED)
    scores = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)  # [BM, BN]
    if D1 > 0:
        k1 = tile(keys, columns, stride_k, limit, DIM, D0, D1, MASKED)
        scores = tl.dot(q1, tl.trans(k1), acc=scores, input_precision=PRECISION)
    if BIAS > 0:
        scores = biased(
            scores * factor, bias, rows, columns, stride_bn, stride_bs, N, limit, BIAS == 2
        )
    if MASKED:
        scores = tl.where((columns < limit)[None, :], scores, float("-inf"))
    if BIAS > 0:
        new = tl.maximum(top, tl.max(scores, 1))
    else:  # the maximum before scaling: scaling and subtraction are then one instruction
        new = tl.maximum(top, tl.max(scores, 1) * factor)
    base = new
    if GUARD:  # rows that attend to nothing so far
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
    q,
    k,
    v,
    prefix_k,
    prefix_v,
    valid,
    bias,
    out,
    lse,
    first,
    factor,
    sq_n,
    sk_n,
    sv_n,
    spk_n,
    spv_n,
    sb_n,
    sb_s,
    so_n,
    N,
    S,
    DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PREFIX_TAIL: tl.constexpr,
    OWN_TAIL: tl.constexpr,
    RAGGED: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BM rows of queries from `first`, over a prefix of `valid` keys and S own keys."""
    rows = first + tl.arange(0, BM)
    q0 = tile(q, rows, sq_n, N, DIM, 0, D0, True)
    q1 = q0
    acc0 = tl.zeros([BM, D0], tl.float32)
    acc1 = acc0
    if D1 > 0:
        q1 = tile(q, rows, sq_n, N, DIM, D0, D1, True)
        acc1 = tl.zeros([BM, D1], tl.float32)
    total = tl.zeros([BM], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    steps = tl.arange(0, BN)

    if RAGGED:
        for start in tl.range(0, valid, BN):
            acc0, acc1, total, top = _attend(
                (acc0, acc1, total, top), (q0, q1), prefix_k, prefix_v, bias, start + steps, valid,
                rows, N, factor, spk_n, spv_n, 0, 0, DIM, D0, D1, True, 0, False, PRECISION,
            )  # fmt: skip
    else:
        whole = valid - valid % BN
        for start in tl.range(0, whole, BN):
            acc0, acc1, total, top = _attend(
                (acc0, acc1, total, top), (q0, q1), prefix_k, prefix_v, bias, start + steps, valid,
                rows, N, factor, spk_n, spv_n, 0, 0, DIM, D0, D1, False, 0, False, PRECISION,
            )  # fmt: skip
        if PREFIX_TAIL > 0:
            acc0, acc1, total, top = _attend(
                (acc0, acc1, total, top), (q0, q1), prefix_k, prefix_v, bias,
                whole + tl.arange(0, PREFIX_TAIL), valid, rows, N, factor, spk_n, spv_n, 0, 0,
                DIM, D0, D1, True, 0, False, PRECISION,
            )  # fmt: skip
    whole = S - S % BN
    for start in tl.range(0, whole, BN):
        acc0, acc1, total, top = _attend(
            (acc0, acc1, total, top), (q0, q1), k, v, bias, start + steps, S,
            rows, N, factor, sk_n, sv_n, sb_n, sb_s, DIM, D0, D1, False, BIAS, BIAS > 0, PRECISION,
        )  # fmt: skip
    if OWN_TAIL > 0:
        acc0, acc1, total, top = _attend(
            (acc0, acc1, total, top), (q0, q1), k, v, bias, whole + tl.arange(0, OWN_TAIL), S,
            rows, N, factor, sk_n, sv_n, sb_n, sb_s, DIM, D0, D1, True, BIAS, BIAS > 0, PRECISION,
        )  # fmt: skip

    denominator = total
    if BIAS > 0:  # a row that attends to nothing gives zeros, as SDPA does
        denominator = tl.where(total == 0.0, 1.0, total)
    inverse = (1.0 / denominator)[:, None]
    _store(out, rows, so_n, N, acc0 * inverse, DIM, 0, D0)
    if D1 > 0:
        _store(out, rows, so_n, N, acc1 * inverse, DIM, D0, D1)
    tl.store(lse + rows, (top + tl.log2(total)) * LN_2, mask=rows < N)


@triton.jit(do_not_specialize=RUNTIME)
def _forward(
    q,
    k,
    v,
    prefix_k,
    prefix_v,
    index,
    lengths,
    bias,
    out,
    lse,
    factor,
    sq_b,
    sq_h,
    sq_n,
    sk_b,
    sk_h,
    sk_n,
    sv_b,
    sv_h,
    sv_n,
    spk_g,
    spk_h,
    spk_n,
    spv_g,
    spv_h,
    spv_n,
    sb_0,
    sb_1,
    sb_h,
    sb_n,
    sb_s,
    B,
    H,
    N,
    S,
    m,
    G,
    B1,
    DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PREFIX_TAIL: tl.constexpr,
    OWN_TAIL: tl.constexpr,
    INDEXED: tl.constexpr,
    RAGGED: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles = tl.cdiv(N, BM)
    pid = tl.program_id(0)
    first = (pid % tiles) * BM
    h = (pid // tiles) % H
    b = pid // (tiles * H)
    b64 = b.to(tl.int64)
    chosen = _set_of(b, index, G, INDEXED)
    q += b64 * sq_b + h * sq_h
    k += b64 * sk_b + h * sk_h
    v += b64 * sv_b + h * sv_h
    prefix_k += chosen * spk_g + h * spk_h
    prefix_v += chosen * spv_g + h * spv_h
    bias += (b64 // B1) * sb_0 + (b64 % B1) * sb_1 + h * sb_h
    out += (b64 * N * H + h) * DIM  # [B, N, H, d]
    lse += (h.to(tl.int64) * B + b) * N
    valid = m
    if RAGGED:
        valid = tl.minimum(tl.load(lengths + chosen).to(tl.int32), m)
    _attend_to_all(
        q, k, v, prefix_k, prefix_v, valid, bias, out, lse, first, factor,
        sq_n, sk_n, sv_n, spk_n, spv_n, sb_n, sb_s, H * DIM, N, S,
        DIM, D0, D1, BM, BN, PREFIX_TAIL, OWN_TAIL, RAGGED, BIAS, PRECISION,
    )  # fmt: skip


@triton.jit
def _slopes(
    queries,
    gradients,
    keys,
    values,
    bias,
    columns,
    limit,
    rows,
    N,
    lse,
    delta,
    factor,
    stride_k,
    stride_v,
    stride_bn,
    stride_bs,
    DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    MASKED: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dL/d(scale * q k) of a tile [BM, BN], and the tile of keys it came from."""
    k0 = tile(keys, columns, stride_k, limit, DIM, 0, D0, MASKED)
    k1 = k0
    scores = tl.dot(queries[0], tl.trans(k0), input_precision=PRECISION)
    if D1 > 0:
        k1 = tile(keys, columns, stride_k, limit, DIM, D0, D1, MASKED)
        scores = tl.dot(queries[1], tl.trans(k1), acc=scores, input_precision=PRECISION)
    scores *= factor
    if BIAS > 0:
        scores = biased(scores, bias, rows, columns, stride_bn, stride_bs, N, limit, BIAS == 2)
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
def _add_query_gradient(
    acc,
    queries,
    gradients,
    keys,
    values,
    bias,
    dbias,
    columns,
    limit,
    rows,
    N,
    lse,
    delta,
    factor,
    stride_k,
    stride_v,
    stride_bn,
    stride_bs,
    DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    MASKED: tl.constexpr,
    BIAS: tl.constexpr,
    NEED_DBIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    acc0, acc1 = acc
    slopes, k0, k1 = _slopes(
        queries, gradients, keys, values, bias, columns, limit, rows, N, lse, delta, factor,
        stride_k, stride_v, stride_bn, stride_bs, DIM, D0, D1, MASKED, BIAS, PRECISION,
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
    q,
    k,
    v,
    prefix_k,
    prefix_v,
    index,
    lengths,
    bias,
    out,
    lse,
    grad_out,
    grad_lse,
    delta,
    dq,
    dbias,
    factor,
    scale,
    sq_b,
    sq_h,
    sq_n,
    sk_b,
    sk_h,
    sk_n,
    sv_b,
    sv_h,
    sv_n,
    spk_g,
    spk_h,
    spk_n,
    spv_g,
    spv_h,
    spv_n,
    sb_0,
    sb_1,
    sb_h,
    sb_n,
    sb_s,
    so_b,
    so_h,
    so_n,
    sg_b,
    sg_h,
    sg_n,
    sl_b,
    sl_h,
    sl_n,
    B,
    H,
    N,
    S,
    m,
    G,
    B1,
    DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PREFIX_TAIL: tl.constexpr,
    OWN_TAIL: tl.constexpr,
    INDEXED: tl.constexpr,
    RAGGED: tl.constexpr,
    BIAS: tl.constexpr,
    LSE_GRAD: tl.constexpr,
    NEED_DQ: tl.constexpr,
    NEED_DBIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """delta = rowsum(dO * O) - dLSE [H, B, N]; dq [B, N, H, d]; dbias [B, H, N, S]."""
    tiles = tl.cdiv(N, BM)
    pid = tl.program_id(0)
    h = (pid // tiles) % H
    b = pid // (tiles * H)
    rows = (pid % tiles) * BM + tl.arange(0, BM)
    b64 = b.to(tl.int64)
    out += b64 * so_b + h * so_h
    grad_out += b64 * sg_b + h * sg_h
    row_base = (h.to(tl.int64) * B + b) * N

    o0 = tile(out, rows, so_n, N, DIM, 0, D0, True)
    g0 = tile(grad_out, rows, sg_n, N, DIM, 0, D0, True)
    g1 = g0
    sums = tl.sum(o0.to(tl.float32) * g0.to(tl.float32), 1)
    if D1 > 0:
        o1 = tile(out, rows, so_n, N, DIM, D0, D1, True)
        g1 = tile(grad_out, rows, sg_n, N, DIM, D0, D1, True)
        sums += tl.sum(o1.to(tl.float32) * g1.to(tl.float32), 1)
    if LSE_GRAD:
        grad_lse += b64 * sl_b + h * sl_h
        sums -= tl.load(grad_lse + rows * sl_n, mask=rows < N, other=0.0)
    tl.store(delta + row_base + rows, sums, mask=rows < N)

    if NEED_DQ:
        normaliser = tl.load(lse + row_base + rows, mask=rows < N, other=float("inf")) * LOG2_E
        # a row that attends to nothing has no gradient
        normaliser = tl.where(normaliser == float("-inf"), float("inf"), normaliser)
        chosen = _set_of(b, index, G, INDEXED)
        q += b64 * sq_b + h * sq_h
        k += b64 * sk_b + h * sk_h
        v += b64 * sv_b + h * sv_h
        prefix_k += chosen * spk_g + h * spk_h
        prefix_v += chosen * spv_g + h * spv_h
        bias += (b64 // B1) * sb_0 + (b64 % B1) * sb_1 + h * sb_h
        q0 = tile(q, rows, sq_n, N, DIM, 0, D0, True)
        q1 = q0
        acc0 = tl.zeros([BM, D0], tl.float32)
        acc1 = acc0
        if D1 > 0:
            q1 = tile(q, rows, sq_n, N, DIM, D0, D1, True)
            acc1 = tl.zeros([BM, D1], tl.float32)
        steps = tl.arange(0, BN)
        if RAGGED:
            valid = tl.minimum(tl.load(lengths + chosen).to(tl.int32), m)
            for start in tl.range(0, valid, BN):
                acc0, acc1 = _add_query_gradient(
                    (acc0, acc1), (q0, q1), (g0, g1), prefix_k, prefix_v, bias, dbias,
                    start + steps, valid, rows, N, normaliser, sums, factor, spk_n, spv_n, 0, 0,
                    DIM, D0, D1, True, 0, False, PRECISION,
                )  # fmt: skip
        else:
            whole = m - m % BN
            for start in tl.range(0, whole, BN):
                acc0, acc1 = _add_query_gradient(
                    (acc0, acc1), (q0, q1), (g0, g1), prefix_k, prefix_v, bias, dbias,
                    start + steps, m, rows, N, normaliser, sums, factor, spk_n, spv_n, 0, 0,
                    DIM, D0, D1, False, 0, False, PRECISION,
                )  # fmt: skip
            if PREFIX_TAIL > 0:
                acc0, acc1 = _add_query_gradient(
                    (acc0, acc1), (q0, q1), (g0, g1), prefix_k, prefix_v, bias, dbias,
                    whole + tl.arange(0, PREFIX_TAIL), m, rows, N, normaliser, sums, factor,
                    spk_n, spv_n, 0, 0, DIM, D0, D1, True, 0, False, PRECISION,
                )  # fmt: skip
        dbias += (b64 * H + h) * N * S
        whole = S - S % BN
        for start in tl.range(0, whole, BN):
            acc0, acc1 = _add_query_gradient(
                (acc0, acc1), (q0, q1), (g0, g1), k, v, bias, dbias, start + steps, S, rows, N,
                normaliser, sums, factor, sk_n, sv_n, sb_n, sb_s,
                DIM, D0, D1, False, BIAS, NEED_DBIAS, PRECISION,
            )  # fmt: skip
        if OWN_TAIL > 0:
            acc0, acc1 = _add_query_gradient(
                (acc0, acc1), (q0, q1), (g0, g1), k, v, bias, dbias,
                whole + tl.arange(0, OWN_TAIL), S, rows, N, normaliser, sums, factor,
                sk_n, sv_n, sb_n, sb_s, DIM, D0, D1, True, BIAS, NEED_DBIAS, PRECISION,
            )  # fmt: skip
        dq += (b64 * N * H + h) * DIM
        _store(dq, rows, H * DIM, N, acc0 * scale, DIM, 0, D0)
        if D1 > 0:
            _store(dq, rows, H * DIM, N, acc1 * scale, DIM, D0, D1)


@triton.jit
def _rows_at(pointer, offsets, inside, DIM: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr,
             MASKED: tl.constexpr):  # fmt: skip
    """[rows, WIDTH] of rows that begin anywhere; zeros outside of them."""
    columns = FIRST + tl.arange(0, WIDTH)
    pointers = pointer + offsets[:, None] + columns[None, :]
    if MASKED:
        values = tl.load(pointers, mask=inside[:, None] & (columns < DIM)[None, :], other=0.0)
    elif FIRST + WIDTH > DIM:
        values = tl.load(pointers, mask=(columns < DIM)[None, :], other=0.0)
    else:
        values = tl.load(pointers)
    return values


@triton.jit
def _add_key_gradients(
    acc,
    keys,
    values,
    q,
    grad_out,
    lse,
    delta,
    bias,
    columns,
    limit,
    first,
    order,
    start,
    end,
    factor,
    sq_b,
    sq_n,
    sg_b,
    sg_n,
    sb_0,
    sb_1,
    sb_n,
    sb_s,
    N,
    B1,
    DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BM: tl.constexpr,
    MASKED: tl.constexpr,
    USERS: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds what BM rows of queries give to the gradients of a tile of keys and values."""
    dk0, dk1, dv0, dv1 = acc
    folded = start + tl.arange(0, BM)
    inside = folded < end
    if USERS == "one":  # the pointers stand at the sample
        q_at = folded * sq_n
        g_at = folded * sg_n
        place = folded
        bias_at = folded * sb_n
    else:
        rows = folded % N
        samples = (first + folded // N).to(tl.int64)
        if USERS == "listed":
            samples = tl.load(order + samples, mask=inside, other=0).to(tl.int64)
        q_at = samples * sq_b + rows * sq_n
        g_at = samples * sg_b + rows * sg_n
        place = samples * N + rows
        bias_at = (samples // B1) * sb_0 + (samples % B1) * sb_1 + rows * sb_n
    q0 = _rows_at(q, q_at, inside, DIM, 0, D0, MASKED)
    q1 = q0
    scores = tl.dot(keys[0], tl.trans(q0), input_precision=PRECISION)  # [BN, BM]
    if D1 > 0:
        q1 = _rows_at(q, q_at, inside, DIM, D0, D1, MASKED)
        scores = tl.dot(keys[1], tl.trans(q1), acc=scores, input_precision=PRECISION)
    scores *= factor
    if BIAS > 0:
        pointers = bias + bias_at[None, :] + columns[:, None] * sb_s
        both = inside[None, :] & (columns < limit)[:, None]
        if BIAS == 2:
            attends = tl.load(pointers, mask=both, other=1)
            scores = tl.where(attends != 0, scores, float("-inf"))
        else:
            scores += tl.load(pointers, mask=both, other=0.0).to(tl.float32) * LOG2_E
    if MASKED:
        normaliser = tl.load(lse + place, mask=inside, other=float("inf")) * LOG2_E
        sums = tl.load(delta + place, mask=inside, other=0.0)
    else:
        normaliser = tl.load(lse + place) * LOG2_E
        sums = tl.load(delta + place)
    if BIAS > 0:  # a row that attends to nothing has no gradient
        normaliser = tl.where(normaliser == float("-inf"), float("inf"), normaliser)
    weights = tl.exp2(scores - normaliser[None, :])
    g0 = _rows_at(grad_out, g_at, inside, DIM, 0, D0, MASKED)
    lower = weights.to(g0.dtype)
    dv0 = tl.dot(lower, g0, acc=dv0, input_precision=PRECISION)
    inner = tl.dot(values[0], tl.trans(g0), input_precision=PRECISION)
    if D1 > 0:
        g1 = _rows_at(grad_out, g_at, inside, DIM, D0, D1, MASKED)
        dv1 = tl.dot(lower, g1, acc=dv1, input_precision=PRECISION)
        inner = tl.dot(values[1], tl.trans(g1), acc=inner, input_precision=PRECISION)
    slopes = (weights * (inner - sums[None, :])).to(q0.dtype)
    dk0 = tl.dot(slopes, q0, acc=dk0, input_precision=PRECISION)
    if D1 > 0:
        dk1 = tl.dot(slopes, q1, acc=dk1, input_precision=PRECISION)
    return dk0, dk1, dv0, dv1


@triton.jit(do_not_specialize=RUNTIME)
def _key_gradients(
    q,
    keys,
    values,
    order,
    bounds,
    lengths,
    bias,
    lse,
    grad_out,
    delta,
    dk,
    dv,
    factor,
    scale,
    sq_b,
    sq_h,
    sq_n,
    sk_g,
    sk_h,
    sk_n,
    sv_g,
    sv_h,
    sv_n,
    sb_0,
    sb_1,
    sb_h,
    sb_n,
    sb_s,
    sg_b,
    sg_h,
    sg_n,
    B,
    H,
    N,
    m,
    G,
    B1,
    rows_per_chunk,
    stride_chunk,
    stride_set,
    stride_head,
    stride_key,
    DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ROW_TAIL: tl.constexpr,
    USERS: tl.constexpr,
    RAGGED: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of the keys and values of G sets, each over the rows of the samples that use it.

    USERS: "one", set g belongs to sample g; "all", one set for all samples; "listed", set g has
    the samples order[bounds[g]:bounds[g + 1]].
    """
    tiles = tl.cdiv(m, BN)
    pid = tl.program_id(0)
    columns = (pid % tiles) * BN + tl.arange(0, BN)
    h = (pid // tiles) % H
    g = (pid // (tiles * H)) % G
    chunk = pid // (tiles * H * G)
    g64 = g.to(tl.int64)
    keys += g64 * sk_g + h * sk_h
    values += g64 * sv_g + h * sv_h
    q += h * sq_h
    grad_out += h * sg_h
    lse += h.to(tl.int64) * B * N
    delta += h.to(tl.int64) * B * N
    bias += h * sb_h

    limit = m
    if RAGGED:
        limit = tl.minimum(tl.load(lengths + g).to(tl.int32), m)
    first = 0
    users = 1
    if USERS == "one":
        q += g64 * sq_b
        grad_out += g64 * sg_b
        lse += g64 * N
        delta += g64 * N
        bias += (g64 // B1) * sb_0 + (g64 % B1) * sb_1
    elif USERS == "all":
        users = B
    else:
        first = tl.load(bounds + g).to(tl.int32)
        users = tl.load(bounds + g + 1).to(tl.int32) - first

    k0 = tile(keys, columns, sk_n, limit, DIM, 0, D0, True)
    v0 = tile(values, columns, sv_n, limit, DIM, 0, D0, True)
    k1 = k0
    v1 = v0
    dk0 = tl.zeros([BN, D0], tl.float32)
    dv0 = tl.zeros([BN, D0], tl.float32)
    dk1 = dk0
    dv1 = dv0
    if D1 > 0:
        k1 = tile(keys, columns, sk_n, limit, DIM, D0, D1, True)
        v1 = tile(values, columns, sv_n, limit, DIM, D0, D1, True)
        dk1 = tl.zeros([BN, D1], tl.float32)
        dv1 = tl.zeros([BN, D1], tl.float32)

    begin = chunk * rows_per_chunk
    end = tl.minimum(begin + rows_per_chunk, users * N)
    whole = end
    if USERS == "one":  # whole tiles, then the rows left over in a tile of their own
        whole = begin + (end - begin) // BM * BM
    for start in tl.range(begin, whole, BM):
        dk0, dk1, dv0, dv1 = _add_key_gradients(
            (dk0, dk1, dv0, dv1), (k0, k1), (v0, v1), q, grad_out, lse, delta, bias, columns,
            limit, first, order, start, end, factor, sq_b, sq_n, sg_b, sg_n,
            sb_0, sb_1, sb_n, sb_s, N, B1, DIM, D0, D1, BM, USERS != "one", USERS, BIAS, PRECISION,
        )  # fmt: skip
    if ROW_TAIL > 0:
        dk0, dk1, dv0, dv1 = _add_key_gradients(
            (dk0, dk1, dv0, dv1), (k0, k1), (v0, v1), q, grad_out, lse, delta, bias, columns,
            limit, first, order, whole, end, factor, sq_b, sq_n, sg_b, sg_n,
            sb_0, sb_1, sb_n, sb_s, N, B1, DIM, D0, D1, ROW_TAIL, True, USERS, BIAS, PRECISION,
        )  # fmt: skip

    valid = (columns < limit)[:, None]  # absent keys of a ragged set get zeros
    place = chunk * stride_chunk + g64 * stride_set + h * stride_head
    _store(dk + place, columns, stride_key, m, tl.where(valid, dk0 * scale, 0.0), DIM, 0, D0)
    _store(dv + place, columns, stride_key, m, tl.where(valid, dv0, 0.0), DIM, 0, D0)
    if D1 > 0:
        _store(dk + place, columns, stride_key, m, tl.where(valid, dk1 * scale, 0.0), DIM, D0, D1)
        _store(dv + place, columns, stride_key, m, tl.where(valid, dv1, 0.0), DIM, D0, D1)


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
    tiles: tuple[int, int, int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, N, d], in memory [B, N, H, d], and LSE [B, H, N] float32, in memory [H, B, N].

    `tiles` is (queries, keys, warps, stages) in place of the shipped configuration.
    """
    batch, heads, n, dim = q.shape
    own, m = k.shape[2], prefix_k.shape[-2]
    out = q.new_empty(batch, n, heads, dim).transpose(1, 2)
    lse = q.new_empty(heads, batch, n, dtype=torch.float32).transpose(0, 1)
    if not out.numel():
        return out, lse
    bm, bn, warps, stages = tiles or _configuration("forward", q, own)
    index, lengths = _dense(index), _dense(lengths)
    q, k, v, prefix_k, prefix_v = map(rowwise, (q, k, v, prefix_k, prefix_v))
    bias_pointer, bias_strides, inner_batch = _bias(bias, q)
    with on_device(q):
        _forward[(triton.cdiv(n, bm) * heads * batch,)](
            q, k, v, prefix_k, prefix_v, _or(index, q), _or(lengths, q), bias_pointer,
            out, lse, scale * LOG2_E.value,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *set_strides(prefix_k), *set_strides(prefix_v), *bias_strides,
            batch, heads, n, own, m, _sets(prefix_k, batch), inner_batch,
            **parts(dim), BM=bm, BN=bn,
            PREFIX_TAIL=0 if lengths is not None else _tail(m, bn), OWN_TAIL=_tail(own, bn),
            INDEXED=index is not None, RAGGED=lengths is not None, BIAS=_bias_kind(bias),
            PRECISION=precision(q), num_warps=warps, num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse


def backward(
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
    needs: tuple[bool, bool, bool, bool],
    tiles: dict[str, tuple[int, int, int, int]] | None = None,
    hopper: tuple[bool, bool, bool] = (False, False, False),
) -> tuple[Tensor | None, ...]:
    """(dq, dk, dv, dprefix_k, dprefix_v, dbias); None where `needs` (q, own, prefix, bias) says no.

    dq, dk and dv lie in memory as [B, N, H, d]; the bias's gradient is [B, H, N, S] float32, to be
    summed to its shape. Those of sets [G, H, m, d] lie in memory as [G, m, H, d]. `hopper` says
    which of the queries', own keys' and prefix's the CUDA kernels of pcx._C give.
    """
    need_q, need_own, need_prefix, need_bias = needs
    batch, heads, _, dim = q.shape
    own, m = k.shape[2], prefix_k.shape[-2]
    q, k, v, prefix_k, prefix_v = map(rowwise, (q, k, v, prefix_k, prefix_v))
    grad_out, out = rowwise(grad_out), rowwise(out)
    lse = lse.transpose(0, 1).contiguous().transpose(0, 1)  # hooks on saved tensors may move it
    index, lengths = _dense(index), _dense(lengths)
    tiles = tiles or {}
    hopper_queries, hopper_own, hopper_prefix = hopper
    if hopper_queries:
        dq, delta = torch.ops.pcx.prefix_attention_query_gradient_hopper(
            q, k, v, prefix_k, prefix_v, index, lengths, out, lse, grad_out, grad_lse, scale
        )
        dbias = None
    else:
        dq, delta, dbias = _query_gradients(
            grad_out, grad_lse, q, k, v, prefix_k, prefix_v, index, lengths, bias, out, lse, scale,
            need_q, need_bias, tiles.get("query") or _configuration("query", q, own),
        )  # fmt: skip
    dk = dv = dprefix_k = dprefix_v = None
    rows = _Rows(q, lse, grad_out, delta, scale)
    if hopper_own:
        dk, dv = _hopper_gradients(k, v, rows)
    elif need_own:
        dk, dv = (q.new_empty(batch, own, heads, dim).transpose(1, 2) for _ in range(2))
        config = tiles.get("own") or _configuration("own", q, own)
        _launch_key_gradients(k, v, dk[None], dv[None], rows, config, bias=bias)
    if hopper_prefix:
        dprefix_k, dprefix_v = _hopper_gradients(prefix_k, prefix_v, rows)
    elif need_prefix:
        config = tiles.get("prefix") or _configuration("prefix", q, m)
        dprefix_k, dprefix_v = _prefix_gradients(prefix_k, prefix_v, rows, index, lengths, config)
    return dq, dk, dv, dprefix_k, dprefix_v, dbias


def _query_gradients(
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
    config: tuple[int, int, int, int],
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """dq; delta = rowsum(dO * O) - dLSE [B, H, N], in memory [H, B, N]; dbias."""
    batch, heads, n, dim = q.shape
    own, m = k.shape[2], prefix_k.shape[-2]
    delta = q.new_empty(heads, batch, n, dtype=torch.float32).transpose(0, 1)
    # A bias's gradient comes from the kernel that makes dq, which then needs a place for it.
    dq = q.new_empty(batch, n, heads, dim).transpose(1, 2) if need_q or need_bias else None
    dbias = q.new_empty(batch, heads, n, own, dtype=torch.float32) if need_bias else None
    bm, bn, warps, stages = config
    bias_pointer, bias_strides, inner_batch = _bias(bias, q)
    if q.numel():
        with on_device(q):
            _query_gradient[(triton.cdiv(n, bm) * heads * batch,)](
                q, k, v, prefix_k, prefix_v, _or(index, q), _or(lengths, q), bias_pointer,
                out, lse, grad_out, _or(grad_lse, lse), delta, _or(dq, delta), _or(dbias, delta),
                scale * LOG2_E.value, scale,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
                *set_strides(prefix_k), *set_strides(prefix_v), *bias_strides,
                *out.stride()[:3], *grad_out.stride()[:3], *_or(grad_lse, lse).stride(),
                batch, heads, n, own, m, _sets(prefix_k, batch), inner_batch,
                **parts(dim), BM=bm, BN=bn,
                PREFIX_TAIL=0 if lengths is not None else _tail(m, bn), OWN_TAIL=_tail(own, bn),
                INDEXED=index is not None, RAGGED=lengths is not None, BIAS=_bias_kind(bias),
                LSE_GRAD=grad_lse is not None, NEED_DQ=need_q or need_bias, NEED_DBIAS=need_bias,
                PRECISION=precision(q), num_warps=warps, num_stages=stages, enable_fp_fusion=True,
            )  # fmt: skip
    return dq if need_q else None, delta, dbias


@dataclass(frozen=True)
class _Rows:
    """What the backward pass reads by query."""

    q: Tensor
    lse: Tensor
    grad_out: Tensor
    delta: Tensor
    scale: float


def _hopper_gradients(keys: Tensor, values: Tensor, rows: _Rows) -> tuple[Tensor, ...]:
    return torch.ops.pcx.prefix_attention_key_gradients_hopper(
        rows.q, rows.grad_out, keys, values, rows.lse, rows.delta, rows.scale
    )


def _prefix_gradients(
    prefix_k: Tensor,
    prefix_v: Tensor,
    rows: _Rows,
    index: Tensor | None,
    lengths: Tensor | None,
    config: tuple[int, int, int, int],
) -> tuple[Tensor, Tensor]:
    batch, heads, n, dim = rows.q.shape
    m, sets = prefix_k.shape[-2], _sets(prefix_k, batch)
    chunks, users = 1, None
    if index is not None or prefix_k.dim() == 3:
        programs = triton.cdiv(max(m, 1), config[1]) * heads * sets
        chunks = _chunk_count(rows.q, programs, batch * n // max(sets, 1))
    if index is not None:
        ordered, order = index.clamp(0, sets - 1).sort(stable=True)
        first = torch.searchsorted(ordered, torch.arange(sets + 1, device=index.device))
        users = (order, first)
    dtype = rows.q.dtype if chunks == 1 else torch.float32
    by_prompt = prefix_k.dim() == 4  # in memory [G, m, H, d]
    shape = (chunks, sets, m, heads, dim) if by_prompt else (chunks, heads, m, dim)
    parts = [rows.q.new_empty(shape, dtype=dtype) for _ in range(2)]
    dk, dv = (part.transpose(2, 3) if by_prompt else part[:, None] for part in parts)
    _launch_key_gradients(prefix_k, prefix_v, dk, dv, rows, config, users=users, lengths=lengths)
    dk, dv = (part[0] if chunks == 1 else part.sum(0).to(rows.q.dtype) for part in parts)
    return (dk.transpose(1, 2), dv.transpose(1, 2)) if by_prompt else (dk, dv)


def _launch_key_gradients(
    keys: Tensor,
    values: Tensor,
    dk: Tensor,
    dv: Tensor,
    rows: _Rows,
    config: tuple[int, int, int, int],
    *,
    users: tuple[Tensor, Tensor] | None = None,
    lengths: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """Fills dk and dv [chunks, G, H, m, d], of the same strides."""
    q, grad_out = rows.q, rows.grad_out
    batch, heads, n, dim = q.shape
    chunks, sets, _, m, _ = dk.shape
    if not dk.numel():
        return
    if not q.numel():
        dk.zero_(), dv.zero_()
        return
    bm, bn, warps, stages = config
    kind = "listed" if users else "all" if keys.dim() == 3 else "one"
    order, bounds = users or (q, q)
    bias_pointer, bias_strides, inner_batch = _bias(bias, q)
    count = n if kind == "one" else batch * n
    per_chunk = n if kind == "one" else triton.cdiv(triton.cdiv(count, chunks), bm) * bm
    assert kind != "one" or chunks == 1
    with on_device(q):
        _key_gradients[(triton.cdiv(m, bn) * heads * sets * chunks,)](
            q, keys, values, order, bounds, _or(lengths, q), bias_pointer, rows.lse, grad_out,
            rows.delta, dk, dv, rows.scale * LOG2_E.value, rows.scale,
            *q.stride()[:3], *set_strides(keys), *set_strides(values), *bias_strides,
            *grad_out.stride()[:3],
            batch, heads, n, m, sets, inner_batch, per_chunk, *dk.stride()[:4],
            **parts(dim), BM=bm, BN=bn, ROW_TAIL=_tail(n, bm) if kind == "one" else 0,
            USERS=kind, RAGGED=lengths is not None, BIAS=_bias_kind(bias),
            PRECISION=precision(q), num_warps=warps, num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip


def _chunk_count(q: Tensor, programs: int, rows: int) -> int:
    """Into how many parts the batch is cut so that the programs fill the chip four times."""
    cores = processors(q.device) if q.is_cuda else 2
    return max(1, min(4 * cores // max(programs, 1), rows // 256))


# (queries, keys, warps, stages), tuned on an H200. In 16 bits none spills there at d = 64 and 80;
# float32 without TF32 goes through plain multiply-adds and does. With head dims of two parts
# (d = 40 and 96) Triton 3.6 gave wrong gradients at 8 warps and in 64x64 tiles, so these keep to
# what the tests on a GPU have passed.
_TILES = {
    "16 bits": {
        "forward": (64, 32, 4, 3),
        "query": (64, 32, 4, 3),
        "own": (64, 64, 4, 3),
        "prefix": (16, 128, 4, 3),
    },
    "16 bits, two parts or d > 64": {
        "forward": (64, 32, 4, 2),
        "query": (64, 32, 4, 2),
        "own": (32, 64, 4, 2),
        "prefix": (32, 64, 4, 2),
    },
    "float32": {
        "forward": (64, 32, 8, 2),
        "query": (16, 32, 8, 2),
        "own": (32, 32, 8, 2),
        "prefix": (32, 32, 8, 2),
    },
}


# Where the tiles above spill with Triton 3.8.
_BY_WARPS = {("16 bits", "own"): (32, 64, 4, 3)}


def _configuration(kernel: str, q: Tensor, keys: int) -> tuple[int, int, int, int]:
    group = "16 bits" if q.shape[-1] in (16, 32, 64) else "16 bits, two parts or d > 64"
    if q.dtype == torch.float32:
        group = "float32"
    bm, bn, warps, stages = _TILES[group][kernel]
    if (group, kernel) in _BY_WARPS and products_of_warps(q):
        bm, bn, warps, stages = _BY_WARPS[group, kernel]
    if kernel in ("forward", "query") and q.shape[2] <= 16:  # queries of [CLS] only
        bm = 16
    if kernel == "prefix" and keys <= bn // 2:
        bm, bn = 32, max(32, triton.next_power_of_2(keys))
    return bm, bn, warps, stages


def _tail(count: int, tile: int) -> int:
    """The tile that holds what whole tiles leave over."""
    rest = count % tile
    return max(16, triton.next_power_of_2(rest)) if rest else 0


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    return other if x is None else x


def _sets(prefix: Tensor, batch: int) -> int:
    return prefix.shape[0] if prefix.dim() == 4 else 1


def _bias(bias: Tensor | None, q: Tensor) -> tuple[Tensor, tuple[int, ...], int]:
    """The bias as bytes or numbers, its five strides (0 along broadcast axes), and B1."""
    if bias is None:
        return q, (0, 0, 0, 0, 0), 1
    strides = tuple(
        0 if size == 1 else s for size, s in zip(bias.shape, bias.stride(), strict=True)
    )
    inner = bias.shape[1] if bias.shape[1] > 1 else q.shape[0] // max(bias.shape[0], 1)
    return (bias.view(torch.uint8) if bias.dtype == torch.bool else bias), strides, max(inner, 1)


def _bias_kind(bias: Tensor | None) -> int:
    """0 none, 1 additive, 2 boolean."""
    return 0 if bias is None else 1 + (bias.dtype == torch.bool)
