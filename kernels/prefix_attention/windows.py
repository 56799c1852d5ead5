"""Attention of small samples, such as Swin's windows, over [a shared prefix; own keys].

One program computes one head of many samples. The prefix, and the bias that these samples share,
are read once and stay on the chip. Of each sample the program reads queries, keys and values. All
keys of a sample lie in two tiles, the prefix's and its own, so that one softmax covers both.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcx.kernels.prefix_attention.blocks import store
from pcx.kernels.tiles import LOG2_E, biased, head_of, precision, set_strides, tile
from pcx.ops.hardware import processors

LN_2 = tl.constexpr(0.6931471805599453)
MOST = 64  # queries and own keys of a sample
MOST_PREFIX = 128
PROGRAMS = 8  # for each processor, at least, where there are as many heads of samples
WARPS, STAGES = 4, 3


class Packing(NamedTuple):
    """How samples are spread over programs.

    Attributes:
        groups: of samples with the same bias; sample b is of group b % groups.
        samples: of a group, which one program computes.
        chunks: programs for a group and head.
    """

    groups: int
    samples: int
    chunks: int


def packing_of(
    q: Tensor, own: int, m: int, sets: bool, bias_strides: tuple[int, ...], inner: int, kind: int
) -> Packing | None:
    """How the samples of a call are packed, None where they are too large for it or differ.

    Args:
        q: [B, H, N, d].
        own: number of a sample's own keys.
        m: length of the prefix.
        sets: whether samples have different prefixes.
        bias_strides, inner, kind: as `bias_arguments` gives them.
    """
    batch, heads, n, dim = q.shape
    most_prefix = MOST_PREFIX if dim < 64 else MOST  # the prefix stays on the chip
    small = max(n, own) <= MOST and m <= most_prefix and dim in (16, 32, 64)
    if not small or min(n, own) <= 16 or sets or q.dtype == torch.float32:
        return None
    groups = 1
    if kind and (bias_strides[0] or bias_strides[1]):
        if bias_strides[0]:  # the bias changes with the outer batch
            return None
        groups = inner
    alike = batch // groups
    wanted = PROGRAMS * (processors(q.device) if q.is_cuda else 1)
    chunks = max(1, min(alike, triton.cdiv(wanted, groups * heads)))
    samples = triton.cdiv(alike, chunks)
    return Packing(groups, samples, triton.cdiv(alike, samples)) if samples > 1 else None


@triton.jit(do_not_specialize=["N", "S", "m", "groups", "samples", "B"])
def _windows(
    q, k, v, prefix_k, prefix_v, bias, out, lse, factor,
    q_strides, k_strides, v_strides, prefix_k_strides, prefix_v_strides, bias_strides,
    B, H, N, S, m, groups, samples,
    DIM: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    h = pid % H  # neighbours read the same lines of memory
    group = (pid // H) % groups
    chunk = pid // (H * groups)
    rows, columns, prompts = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BP)
    group64 = group.to(tl.int64)
    prefix_k = head_of(prefix_k, group64 * 0, h, prefix_k_strides, DIM)
    prefix_v = head_of(prefix_v, group64 * 0, h, prefix_v_strides, DIM)
    shared_k = tl.trans(tile(prefix_k, prompts, prefix_k_strides[2], m, DIM, 0, DIM, True))
    shared_v = tile(prefix_v, prompts, prefix_v_strides[2], m, DIM, 0, DIM, True)
    added = tl.zeros([BM, BN], tl.float32)
    if BIAS > 0:
        own_bias = bias + group64 * bias_strides[1] + h * bias_strides[2]
        added = biased(
            added, own_bias, rows, columns, bias_strides[3], bias_strides[4], N, S, BIAS == 2
        )
    added = tl.where((columns < S)[None, :], added, float("-inf"))
    first = chunk * samples
    last = tl.minimum(first + samples, B // groups)
    for i in tl.range(first, last):
        b = group64 + i * groups
        own_q = tile(head_of(q, b, h, q_strides, DIM), rows, q_strides[2], N, DIM, 0, DIM, True)
        own_k = tile(head_of(k, b, h, k_strides, DIM), columns, k_strides[2], S, DIM, 0, DIM, True)
        own_v = tile(head_of(v, b, h, v_strides, DIM), columns, v_strides[2], S, DIM, 0, DIM, True)
        to_prefix = tl.dot(own_q, shared_k, input_precision=PRECISION) * factor
        to_prefix = tl.where((prompts < m)[None, :], to_prefix, float("-inf"))
        to_own = tl.dot(own_q, tl.trans(own_k), input_precision=PRECISION) * factor + added
        top = tl.maximum(tl.max(to_prefix, 1), tl.max(to_own, 1))
        base = tl.where(top == float("-inf"), 0.0, top)  # where a row attends to nothing
        to_prefix = tl.exp2(to_prefix - base[:, None])
        to_own = tl.exp2(to_own - base[:, None])
        total = tl.sum(to_prefix, 1) + tl.sum(to_own, 1)
        total = tl.where(total == 0.0, 1.0, total)  # such rows give zeros, as SDPA does
        found = tl.dot(to_prefix.to(shared_v.dtype), shared_v, input_precision=PRECISION)
        found = tl.dot(to_own.to(own_v.dtype), own_v, acc=found, input_precision=PRECISION)
        found = found / total[:, None]
        store(out + (b * N * H + h) * DIM, rows, H * DIM, N, found, DIM, 0, DIM)  # [B, N, H, d]
        own_lse = lse + (h.to(tl.int64) * B + b) * N
        tl.store(own_lse + rows, (top + tl.log2(total)) * LN_2, mask=rows < N)


def forward_packed(
    packing: Packing,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    bias: tuple[Tensor, tuple[int, ...], int],
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> None:
    """Writes the output and the LSE, which the caller made as `forward` describes them.

    Args:
        packing: of `packing_of`.
        q, k, v, prefix_k, prefix_v: with dense rows.
        bias: as `bias_arguments` gives it, without its number of inner batches.
        out: [B, H, N, d], in memory [B, N, H, d].
        lse: [B, H, N], in memory [H, B, N].
        scale: of the scores.
    """
    batch, heads, n, dim = q.shape
    own, m = k.shape[2], prefix_k.shape[-2]
    pointer, bias_strides, kind = bias
    prefix_tile, own_tile = (max(16, triton.next_power_of_2(size)) for size in (m, own))
    _windows[(packing.groups * packing.chunks * heads,)](
        q, k, v, prefix_k, prefix_v, pointer, out, lse, scale * LOG2_E.value,
        q.stride()[:3], k.stride()[:3], v.stride()[:3], set_strides(prefix_k),
        set_strides(prefix_v), bias_strides,
        batch, heads, n, own, m, packing.groups, packing.samples,
        DIM=dim, BM=MOST, BP=prefix_tile, BN=own_tile, BIAS=kind, PRECISION=precision(q),
        num_warps=WARPS, num_stages=STAGES, enable_fp_fusion=True,
    )  # fmt: skip
