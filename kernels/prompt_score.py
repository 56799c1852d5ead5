"""Scores of prompts: from gradients by what their LayerNorm gives, and by their attention logits.

`prompt_score`: one program takes one prompt and a few samples. The prompt's row, mean and variance
are read and computed once, each sample's gradient is read once, and two numbers are written for it.
`prefix_logit_gradient`: one program takes a tile of a prefix's keys of one head and sample, and
goes over its queries. No atomics: the same bits on every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcx.kernels.launch import on_device, rowwise
from pcx.kernels.tiles import LOG2_E, parts, precision, set_strides, tile

SAMPLES = 4  # of one program


@triton.jit
def _score(
    gradient,
    prompts,
    weight,
    taylor,
    inner,
    stride_b,
    stride_m,
    B,
    m,
    D,
    eps,
    COLUMNS: tl.constexpr,
    SAMPLES: tl.constexpr,
    NORM: tl.constexpr,
    AFFINE: tl.constexpr,
):
    i = tl.program_id(0)
    columns = tl.arange(0, COLUMNS)
    inside = columns < D
    p = tl.load(prompts + i.to(tl.int64) * D + columns, mask=inside, other=0.0).to(tl.float32)
    normed = p
    factor = p  # the score is that of (gradient - its two means) * factor
    gamma = inside.to(tl.float32)
    if NORM:
        centred = tl.where(inside, p - tl.sum(p) / D, 0.0)
        inverse = 1.0 / tl.sqrt(tl.sum(centred * centred) / D + eps)
        normed = centred * inverse
        factor = p * inverse
        if AFFINE:
            gamma = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    for step in range(SAMPLES):
        b = tl.program_id(1) * SAMPLES + step
        if b < B:
            row = gradient + b.to(tl.int64) * stride_b + i.to(tl.int64) * stride_m
            g = tl.load(row + columns, mask=inside, other=0.0).to(tl.float32)
            if NORM:
                g *= gamma
                g = g - tl.sum(g) / D - normed * (tl.sum(g * normed) / D)
            product = tl.where(inside, g * factor, 0.0)
            tl.store(taylor + b * m + i, tl.sqrt(tl.sum(product * product)))
            tl.store(inner + b * m + i, tl.abs(tl.sum(product)))


@triton.jit(do_not_specialize=["N", "m"])
def _logit_gradient(
    q, keys, values, out, grad_out, lse, slopes, factor,
    sq_b, sq_h, sq_n, sk_b, sk_h, sk_m, sv_b, sv_h, sv_m, so_b, so_h, so_n, sg_b, sg_h, sg_n,
    sl_b, sl_h, sl_n, H, N, m,
    DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    keys += b * sk_b + h * sk_h
    values += b * sv_b + h * sv_h
    q += b * sq_b + h * sq_h
    out += b * so_b + h * so_h
    grad_out += b * sg_b + h * sg_h
    lse += b * sl_b + h * sl_h
    k0 = tile(keys, columns, sk_m, m, DIM, 0, D0, True)
    v0 = tile(values, columns, sv_m, m, DIM, 0, D0, True)
    k1, v1 = k0, v0
    if D1 > 0:
        k1 = tile(keys, columns, sk_m, m, DIM, D0, D1, True)
        v1 = tile(values, columns, sv_m, m, DIM, D0, D1, True)
    total = tl.zeros([BN], tl.float32)
    for start in tl.range(0, N, BM):
        rows = start + tl.arange(0, BM)
        q0 = tile(q, rows, sq_n, N, DIM, 0, D0, True)
        g0 = tile(grad_out, rows, sg_n, N, DIM, 0, D0, True)
        o0 = tile(out, rows, so_n, N, DIM, 0, D0, True)
        delta = tl.sum(g0.to(tl.float32) * o0.to(tl.float32), 1)
        logits = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)  # [BM, BN]
        inner = tl.dot(g0, tl.trans(v0), input_precision=PRECISION)
        if D1 > 0:
            q1 = tile(q, rows, sq_n, N, DIM, D0, D1, True)
            g1 = tile(grad_out, rows, sg_n, N, DIM, D0, D1, True)
            o1 = tile(out, rows, so_n, N, DIM, D0, D1, True)
            delta += tl.sum(g1.to(tl.float32) * o1.to(tl.float32), 1)
            logits = tl.dot(q1, tl.trans(k1), acc=logits, input_precision=PRECISION)
            inner = tl.dot(g1, tl.trans(v1), acc=inner, input_precision=PRECISION)
        normaliser = tl.load(lse + rows * sl_n, mask=rows < N, other=float("inf")) * LOG2_E
        # A row that attends to nothing has no weights.
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
    """[B, H, m] float32, as `pcx.ops.reference` says."""
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
            *q.stride()[:3], *set_strides(prefix_k), *set_strides(prefix_v), *out.stride()[:3],
            *grad_out.stride()[:3], *lse.stride(), heads, n, m,
            **parts(dim), BM=32, BN=width, PRECISION=precision(q), num_warps=4, num_stages=2,
            enable_fp_fusion=True,
        )  # fmt: skip
    return slopes


def prompt_score(
    gradient: Tensor, prompts: Tensor, layer_norm: bool, weight: Tensor | None, eps: float
) -> Tensor:
    """[2, B, m] float32, as `pcx.ops.prompt_score` says."""
    batch, m, dim = gradient.shape
    scores = gradient.new_empty(2, batch, m, dtype=torch.float32)
    if scores.numel():
        gradient, prompts = rowwise(gradient), prompts.contiguous()
        scale = None if weight is None else weight.contiguous()
        with on_device(gradient):
            _score[(m, triton.cdiv(batch, SAMPLES))](
                gradient, prompts, prompts if scale is None else scale, scores[0], scores[1],
                *gradient.stride()[:2], batch, m, dim, eps,
                COLUMNS=triton.next_power_of_2(dim), SAMPLES=SAMPLES, NORM=layer_norm,
                AFFINE=scale is not None, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return scores
