"""The backward pass of prefix_attention: all gradients of one call."""

from __future__ import annotations

import torch
from torch import Tensor

from pcx.kernels.launch import rowwise
from pcx.kernels.prefix_attention.key_gradients import (
    Rows,
    fill_gradients,
    hopper_gradients,
    prefix_gradients,
)
from pcx.kernels.prefix_attention.launch import Tiles, configuration, dense
from pcx.kernels.prefix_attention.query_gradient import query_gradient


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
    tiles: dict[str, Tiles] | None = None,
    hopper: tuple[bool, bool, bool] = (False, False, False),
) -> tuple[Tensor | None, ...]:
    """The gradients (dq, dk, dv, dprefix_k, dprefix_v, dbias).

    `needs` says which of (q, own keys, prefix, bias) need one; the others are None. `hopper` says
    which of (q, own keys, prefix) the CUDA kernels of pcx._C compute.

    dq, dk and dv lie in memory as [B, N, H, d], and those of sets [G, H, m, d] as [G, m, H, d]. The
    gradient of the bias is [B, H, N, S] float32; the caller sums it to the bias's shape.
    """
    need_q, need_own, need_prefix, need_bias = needs
    batch, heads, _, dim = q.shape
    own, m = k.shape[2], prefix_k.shape[-2]
    q, k, v, prefix_k, prefix_v = map(rowwise, (q, k, v, prefix_k, prefix_v))
    grad_out, out = rowwise(grad_out), rowwise(out)
    lse = lse.transpose(0, 1).contiguous().transpose(0, 1)  # hooks may change its layout
    index, lengths = dense(index), dense(lengths)
    tiles = tiles or {}
    hopper_queries, hopper_own, hopper_prefix = hopper
    if hopper_queries:
        dq, delta = torch.ops.pcx.prefix_attention_query_gradient_hopper(
            q, k, v, prefix_k, prefix_v, index, lengths, out, lse, grad_out, grad_lse, scale
        )
        dbias = None
    else:
        dq, delta, dbias = query_gradient(
            grad_out, grad_lse, q, k, v, prefix_k, prefix_v, index, lengths, bias, out, lse, scale,
            need_q, need_bias, tiles.get("query") or configuration("query", q, own),
        )  # fmt: skip
    dk = dv = dprefix_k = dprefix_v = None
    rows = Rows(q, lse, grad_out, delta, scale)
    if hopper_own:
        dk, dv = hopper_gradients(k, v, rows)
    elif need_own:
        dk, dv = (q.new_empty(batch, own, heads, dim).transpose(1, 2) for _ in range(2))
        config = tiles.get("own") or configuration("own", q, own)
        fill_gradients(k, v, dk[None], dv[None], rows, config, bias=bias)
    if hopper_prefix:
        dprefix_k, dprefix_v = hopper_gradients(prefix_k, prefix_v, rows)
    elif need_prefix:
        config = tiles.get("prefix") or configuration("prefix", q, m)
        dprefix_k, dprefix_v = prefix_gradients(prefix_k, prefix_v, rows, index, lengths, config)
    return dq, dk, dv, dprefix_k, dprefix_v, dbias
