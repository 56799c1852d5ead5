"""Scores of prompts from per-sample gradients, taken at the prompts or behind their LayerNorm.

One program computes one prompt and a few samples. It reads the prompt's row once, and computes its
mean and variance once. It reads each sample's gradient once, and writes two numbers for it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcx.kernels.launch import on_device, rowwise

SAMPLES = 4  # samples per program


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


def prompt_score(
    gradient: Tensor, prompts: Tensor, layer_norm: bool, weight: Tensor | None, eps: float
) -> Tensor:
    """The scores [2, B, m] float32; arguments are those of `pcx.ops.prompt_score`."""
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
