"""The gradients of keys and values, of a prefix and of a sample's own.

One program computes a tile of keys and loops over the queries that use them. One kernel computes
both kinds, since a sample's own keys are a prefix that it alone uses. The rows of all samples that
share a prefix are folded into one axis and cut into chunks. The chunks' partial sums are added in a
fixed order. There are no atomics, so every run gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcx.kernels.launch import on_device
from pcx.kernels.prefix_attention.blocks import rows_at, store
from pcx.kernels.prefix_attention.launch import (
    RUNTIME,
    Tiles,
    bias_arguments,
    chunk_count,
    given,
    set_count,
    tail,
)
from pcx.kernels.tiles import LOG2_E, head_of, parts, precision, set_strides, tile


@triton.jit
def _add(
    acc, keys, values, q, grad_out, lse, delta, bias, columns, limit, first, order, start, end,
    factor, q_strides, grad_out_strides, bias_strides, N, B1,
    DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, MASKED: tl.constexpr,
    USERS: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the contribution of BM rows of queries to the gradients of a tile of keys and values."""
    dk0, dk1, dv0, dv1 = acc
    folded = start + tl.arange(0, BM)
    inside = folded < end
    if USERS == "one":  # the pointers are already at the sample
        q_at = folded * q_strides[2]
        g_at = folded * grad_out_strides[2]
        place = folded
        bias_at = folded * bias_strides[3]
    else:
        rows = folded % N
        samples = (first + folded // N).to(tl.int64)
        if USERS == "listed":
            samples = tl.load(order + samples, mask=inside, other=0).to(tl.int64)
        q_at = samples * q_strides[0] + rows * q_strides[2]
        g_at = samples * grad_out_strides[0] + rows * grad_out_strides[2]
        place = samples * N + rows
        bias_at = (samples // B1) * bias_strides[0] + (samples % B1) * bias_strides[1]
        bias_at += rows * bias_strides[3]
    q0 = rows_at(q, q_at, inside, DIM, 0, D0, MASKED)
    q1 = q0
    scores = tl.dot(keys[0], tl.trans(q0), input_precision=PRECISION)  # [BN, BM]
    if D1 > 0:
        q1 = rows_at(q, q_at, inside, DIM, D0, D1, MASKED)
        scores = tl.dot(keys[1], tl.trans(q1), acc=scores, input_precision=PRECISION)
    scores *= factor
    if BIAS > 0:
        pointers = bias + bias_at[None, :] + columns[:, None] * bias_strides[4]
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
    g0 = rows_at(grad_out, g_at, inside, DIM, 0, D0, MASKED)
    lower = weights.to(g0.dtype)
    dv0 = tl.dot(lower, g0, acc=dv0, input_precision=PRECISION)
    inner = tl.dot(values[0], tl.trans(g0), input_precision=PRECISION)
    if D1 > 0:
        g1 = rows_at(grad_out, g_at, inside, DIM, D0, D1, MASKED)
        dv1 = tl.dot(lower, g1, acc=dv1, input_precision=PRECISION)
        inner = tl.dot(values[1], tl.trans(g1), acc=inner, input_precision=PRECISION)
    slopes = (weights * (inner - sums[None, :])).to(q0.dtype)
    dk0 = tl.dot(slopes, q0, acc=dk0, input_precision=PRECISION)
    if D1 > 0:
        dk1 = tl.dot(slopes, q1, acc=dk1, input_precision=PRECISION)
    return dk0, dk1, dv0, dv1


@triton.jit(do_not_specialize=RUNTIME)
def _key_gradients(
    q, keys, values, order, bounds, lengths, bias, lse, grad_out, delta, dk, dv, factor, scale,
    q_strides, key_strides, value_strides, bias_strides, grad_out_strides,
    B, H, N, m, G, B1, rows_per_chunk, out_strides,
    DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ROW_TAIL: tl.constexpr, USERS: tl.constexpr, RAGGED: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
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
    keys = head_of(keys, g64, h, key_strides, DIM)
    values = head_of(values, g64, h, value_strides, DIM)
    q = head_of(q, 0, h, q_strides, DIM)
    grad_out = head_of(grad_out, 0, h, grad_out_strides, DIM)
    lse += h.to(tl.int64) * B * N
    delta += h.to(tl.int64) * B * N
    bias += h * bias_strides[2]

    limit = m
    if RAGGED:
        limit = tl.minimum(tl.load(lengths + g).to(tl.int32), m)
    first = 0
    users = 1
    if USERS == "one":
        q = head_of(q, g64, 0, q_strides, DIM)
        grad_out = head_of(grad_out, g64, 0, grad_out_strides, DIM)
        lse += g64 * N
        delta += g64 * N
        bias += (g64 // B1) * bias_strides[0] + (g64 % B1) * bias_strides[1]
    elif USERS == "all":
        users = B
    else:
        first = tl.load(bounds + g).to(tl.int32)
        users = tl.load(bounds + g + 1).to(tl.int32) - first

    k0 = tile(keys, columns, key_strides[2], limit, DIM, 0, D0, True)
    v0 = tile(values, columns, value_strides[2], limit, DIM, 0, D0, True)
    k1 = k0
    v1 = v0
    dk0 = tl.zeros([BN, D0], tl.float32)
    dv0 = tl.zeros([BN, D0], tl.float32)
    dk1 = dk0
    dv1 = dv0
    if D1 > 0:
        k1 = tile(keys, columns, key_strides[2], limit, DIM, D0, D1, True)
        v1 = tile(values, columns, value_strides[2], limit, DIM, D0, D1, True)
        dk1 = tl.zeros([BN, D1], tl.float32)
        dv1 = tl.zeros([BN, D1], tl.float32)

    begin = chunk * rows_per_chunk
    end = tl.minimum(begin + rows_per_chunk, users * N)
    whole = end
    if USERS == "one":  # whole tiles, then a smaller tile with the remaining rows
        whole = begin + (end - begin) // BM * BM
    for start in tl.range(begin, whole, BM):
        dk0, dk1, dv0, dv1 = _add(
            (dk0, dk1, dv0, dv1), (k0, k1), (v0, v1), q, grad_out, lse, delta, bias, columns,
            limit, first, order, start, end, factor, q_strides, grad_out_strides, bias_strides,
            N, B1, DIM, D0, D1, BM, USERS != "one", USERS, BIAS, PRECISION,
        )  # fmt: skip
    if ROW_TAIL > 0:
        dk0, dk1, dv0, dv1 = _add(
            (dk0, dk1, dv0, dv1), (k0, k1), (v0, v1), q, grad_out, lse, delta, bias, columns,
            limit, first, order, whole, end, factor, q_strides, grad_out_strides, bias_strides,
            N, B1, DIM, D0, D1, ROW_TAIL, True, USERS, BIAS, PRECISION,
        )  # fmt: skip

    valid = (columns < limit)[:, None]  # absent keys of a ragged set get zeros
    place = chunk * out_strides[0] + g64 * out_strides[1] + h * out_strides[2]
    if DIM % 8 == 0:  # see `head_of`
        place = tl.multiple_of(place, 8)
    step = out_strides[3]
    store(dk + place, columns, step, m, tl.where(valid, dk0 * scale, 0.0), DIM, 0, D0)
    store(dv + place, columns, step, m, tl.where(valid, dv0, 0.0), DIM, 0, D0)
    if D1 > 0:
        store(dk + place, columns, step, m, tl.where(valid, dk1 * scale, 0.0), DIM, D0, D1)
        store(dv + place, columns, step, m, tl.where(valid, dv1, 0.0), DIM, D0, D1)


@dataclass(frozen=True)
class Rows:
    """The tensors of the backward pass that have a row per query."""

    q: Tensor
    lse: Tensor
    grad_out: Tensor
    delta: Tensor
    scale: float


def hopper_gradients(keys: Tensor, values: Tensor, rows: Rows) -> tuple[Tensor, ...]:
    """dk and dv, computed by the CUDA kernels for Hopper."""
    return torch.ops.pcx.prefix_attention_key_gradients_hopper(
        rows.q, rows.grad_out, keys, values, rows.lse, rows.delta, rows.scale
    )


def prefix_gradients(
    prefix_k: Tensor,
    prefix_v: Tensor,
    rows: Rows,
    index: Tensor | None,
    lengths: Tensor | None,
    config: Tiles,
) -> tuple[Tensor, Tensor]:
    """dprefix_k and dprefix_v of a prefix [H, m, d] or of sets [G, H, m, d]."""
    batch, heads, n, dim = rows.q.shape
    m, sets = prefix_k.shape[-2], set_count(prefix_k)
    chunks, users = 1, None
    if index is not None or prefix_k.dim() == 3:
        programs = triton.cdiv(max(m, 1), config[1]) * heads * sets
        chunks = chunk_count(rows.q, programs, batch * n // max(sets, 1))
    if index is not None:
        ordered, order = index.clamp(0, sets - 1).sort(stable=True)
        first = torch.searchsorted(ordered, torch.arange(sets + 1, device=index.device))
        users = (order, first)
    dtype = rows.q.dtype if chunks == 1 else torch.float32
    by_prompt = prefix_k.dim() == 4  # in memory [G, m, H, d]
    shape = (chunks, sets, m, heads, dim) if by_prompt else (chunks, heads, m, dim)
    parts = [rows.q.new_empty(shape, dtype=dtype) for _ in range(2)]
    dk, dv = (part.transpose(2, 3) if by_prompt else part[:, None] for part in parts)
    fill_gradients(prefix_k, prefix_v, dk, dv, rows, config, users=users, lengths=lengths)
    dk, dv = (part[0] if chunks == 1 else part.sum(0).to(rows.q.dtype) for part in parts)
    return (dk.transpose(1, 2), dv.transpose(1, 2)) if by_prompt else (dk, dv)


def fill_gradients(
    keys: Tensor,
    values: Tensor,
    dk: Tensor,
    dv: Tensor,
    rows: Rows,
    config: Tiles,
    *,
    users: tuple[Tensor, Tensor] | None = None,
    lengths: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """Fills dk and dv [chunks, G, H, m, d], which must have equal strides."""
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
    pointer, bias_strides, inner_batch, bias_kind = bias_arguments(bias, q)
    count = n if kind == "one" else batch * n
    per_chunk = n if kind == "one" else triton.cdiv(triton.cdiv(count, chunks), bm) * bm
    assert kind != "one" or chunks == 1
    with on_device(q):
        _key_gradients[(triton.cdiv(m, bn) * heads * sets * chunks,)](
            q, keys, values, order, bounds, given(lengths, q), pointer, rows.lse, grad_out,
            rows.delta, dk, dv, rows.scale * LOG2_E.value, rows.scale,
            q.stride()[:3], set_strides(keys), set_strides(values), bias_strides,
            grad_out.stride()[:3],
            batch, heads, n, m, sets, inner_batch, per_chunk, dk.stride()[:4],
            **parts(dim), BM=bm, BN=bn, ROW_TAIL=tail(n, bm) if kind == "one" else 0,
            USERS=kind, RAGGED=lengths is not None, BIAS=bias_kind,
            PRECISION=precision(q), num_warps=warps, num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip
