"""Weighted PageRank, s <- A^T s with A = softmax(q k^T scale + bias), for any number of tokens.

A is never stored. The denominators of its rows are computed once. Every iteration computes A's
tiles again. `_divide` loops over the keys of a tile of rows. `_vote` loops over the rows of a tile
of keys and sums their votes. There are no atomics, so every run gives the same bits.

The kernels of csrc/cuda keep A in registers instead. They run calls without bias or prefix, whose A
fits the registers of one block, or of two on Hopper.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcx.kernels.launch import on_device, products_of_warps, rowwise
from pcx.kernels.tiles import LOG2_E, biased, head_of, parts, set_strides, tile

RUNTIME = ["n", "m"]  # not specialised: they vary from call to call


@triton.jit
def _place(n, H, TILE: tl.constexpr):
    """The place of a program: its head among all, its sample, its head there, and its tile."""
    tiles = tl.cdiv(n, TILE)
    head = tl.program_id(0) // tiles
    tokens = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    return head.to(tl.int64), (head // H).to(tl.int64), (head % H).to(tl.int64), tokens


@triton.jit
def _rows(pointer, rows, stride, limit, DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Loads rows of a head: their first D0 columns and, if D1 is not 0, the D1 after."""
    first = tile(pointer, rows, stride, limit, DIM, 0, D0, True)
    second = first
    if D1 > 0:
        second = tile(pointer, rows, stride, limit, DIM, D0, D1, True)
    return first, second


@triton.jit
def _logits(
    queries, keys, rows, columns, n, limit, bias, factor,
    D1: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits [BM, BN] in units of log2, of n rows and `limit` columns.

    `bias` is (pointer, strides of rows and columns).
    """
    logits = tl.dot(queries[0], tl.trans(keys[0]), input_precision=PRECISION)
    if D1 > 0:
        logits = tl.dot(queries[1], tl.trans(keys[1]), acc=logits, input_precision=PRECISION)
    logits *= factor
    if BIAS:
        logits = biased(logits, bias[0], rows, columns, bias[1], bias[2], n, limit, False)
    return logits


@triton.jit
def _add_keys(
    state, queries, pointer, stride, limit, start, rows, n, bias, factor,
    DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BN: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds a tile of keys to the denominators of a tile of rows: the sum over 2**top, and top."""
    total, top = state
    columns = start + tl.arange(0, BN)
    keys = _rows(pointer, columns, stride, limit, DIM, D0, D1)
    logits = _logits(queries, keys, rows, columns, n, limit, bias, factor, D1, BIAS, PRECISION)
    logits = tl.where((columns < limit)[None, :], logits, float("-inf"))
    new = tl.maximum(top, tl.max(logits, 1))
    base = tl.where(new == float("-inf"), 0.0, new)  # for rows that attend to nothing so far
    total = total * tl.exp2(top - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
    return total, new


@triton.jit(do_not_specialize=RUNTIME)
def _divide(
    q, k, prefix, bias, divisors, factor,
    q_strides, k_strides, prefix_strides, bias_strides, H, n, m,
    DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PREFIX: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """log2 of the denominator of each row of A; infinity for a row that attends to nothing."""
    head, b, h, rows = _place(n, H, BM)
    q = head_of(q, b, h, q_strides, DIM)
    k = head_of(k, b, h, k_strides, DIM)
    prefix = head_of(prefix, b, h, prefix_strides, DIM)
    added = (head_of(bias, b, h, bias_strides, 1), bias_strides[2], bias_strides[3])
    queries = _rows(q, rows, q_strides[2], n, DIM, D0, D1)
    total = tl.zeros([BM], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    if PREFIX:
        for start in tl.range(0, m, BN):
            total, top = _add_keys(
                (total, top), queries, prefix, prefix_strides[2], m, start, rows, n, added, factor,
                DIM, D0, D1, BN, False, PRECISION,
            )  # fmt: skip
    for start in tl.range(0, n, BN):
        total, top = _add_keys(
            (total, top), queries, k, k_strides[2], n, start, rows, n, added, factor,
            DIM, D0, D1, BN, BIAS, PRECISION,
        )  # fmt: skip
    nothing = total == 0.0
    found = tl.where(nothing, float("inf"), top + tl.log2(tl.where(nothing, 1.0, total)))
    tl.store(divisors + head * n + rows, found, mask=rows < n)


@triton.jit(do_not_specialize=RUNTIME)
def _vote(
    q, k, bias, divisors, scores, out, factor,
    q_strides, k_strides, bias_strides, H, n,
    DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One iteration, A^T scores, for a tile of BN tokens."""
    head, b, h, columns = _place(n, H, BN)
    q = head_of(q, b, h, q_strides, DIM)
    k = head_of(k, b, h, k_strides, DIM)
    added = (head_of(bias, b, h, bias_strides, 1), bias_strides[2], bias_strides[3])
    divisors += head * n
    scores += head * n
    keys = _rows(k, columns, k_strides[2], n, DIM, D0, D1)
    votes = tl.zeros([BM, BN], tl.float32)
    for start in tl.range(0, n, BM):
        rows = start + tl.arange(0, BM)
        queries = _rows(q, rows, q_strides[2], n, DIM, D0, D1)
        logits = _logits(queries, keys, rows, columns, n, n, added, factor, D1, BIAS, PRECISION)
        divisor = tl.load(divisors + rows, mask=rows < n, other=float("inf"))
        score = tl.load(scores + rows, mask=rows < n, other=0.0)
        votes += tl.exp2(logits - divisor[:, None]) * score[:, None]
    tl.store(out + head * n + columns, tl.sum(votes, 0), mask=columns < n)


def weighted_pagerank(
    q: Tensor,
    k: Tensor,
    init: Tensor,
    bias: Tensor | None,
    prefix_k: Tensor | None,
    iters: int,
    scale: float,
) -> Tensor:
    """The scores [B, H, n] float32; arguments are those of `pcx.ops.reference.weighted_pagerank`.

    q and k hold the graph's tokens alone. They have the same dtype as the prefix.
    """
    batch, heads, n, dim = q.shape
    scores = init.float().contiguous()
    if not scores.numel() or not iters:
        return scores.clone() if scores is init else scores
    q, k = rowwise(q), rowwise(k)
    m = 0 if prefix_k is None else prefix_k.shape[1]
    prefix = rowwise(prefix_k) if prefix_k is not None else k
    added = divisors = torch.empty_like(scores)
    sb: tuple[int, ...] = (0, 0, 0, 0)
    if bias is not None:
        added, sb = bias, bias.stride()
    factor = scale * LOG2_E.value
    single = q.dtype == torch.float32
    # The largest tiles that fit the registers.
    wide = dim > 64 or bias is not None
    rows, columns = 64, 64 >> (wide + (single and products_of_warps(q)))
    options = {
        **parts(dim),
        "BIAS": bias is not None,
        "PRECISION": "tf32x3" if single else "ieee",
        "num_warps": 4,
        "num_stages": 2 if single else 3,
        "enable_fp_fusion": True,
    }
    strides = q.stride()[:3], k.stride()[:3]
    with on_device(q):
        _divide[(batch * heads * triton.cdiv(n, rows),)](
            q, k, prefix, added, divisors, factor, *strides, set_strides(prefix), sb, heads, n, m,
            BM=rows, BN=columns, PREFIX=m > 0, **options,
        )  # fmt: skip
        for step in range(1, iters + 1):
            voted = torch.empty_like(scores)
            _vote[(batch * heads * triton.cdiv(n, columns),)](
                q, k, added, divisors, scores, voted, factor, *strides, sb, heads, n,
                BM=rows, BN=columns, **options,
            )  # fmt: skip
            scores = voted
            # A prefix takes a part of the scores, and so do rows that a bias leaves no key. In all
            # other calls the sum is 1 up to rounding.
            if step == iters or m or bias is not None:
                total = scores.sum(-1, keepdim=True)
                scores = torch.where(total == 0, 1 / n, scores / total)
    return scores
