"""Weighted PageRank over the graph that attention draws between tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pcx.ops import reference, registration  # noqa: F401  registration defines the operation
from pcx.ops.backends import exporting
from pcx.ops.checks import broadcasts


def weighted_pagerank(
    q: Tensor,
    k: Tensor,
    *,
    iters: int,
    init: Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    prefix_k: Tensor | None = None,
    among: Tensor | None = None,
) -> Tensor:
    """Importance of tokens: s <- A^T s with A = softmax(q k^T scale) (Zero-TPrune, Algorithm 1).

    A token is important if important tokens attend to it. The scores of a head sum to 1 before and
    after every iteration.

    Args:
        q, k: [B, H, N, d], of the same N tokens.
        iters: how often, 0 or more.
        init: the scores at first, broadcastable to [B, H, n], not negative; scaled to sum to 1.
            Uniform by default.
        scale: 1/sqrt(d) by default.
        bias: as SDPA's attn_mask, additive or boolean, broadcastable to [B, H, n, n].
        prefix_k: keys [H, m, d] that every token attends to besides, such as prompts'. They are
            sinks: what flows to them in an iteration is taken out of the graph, and what is left
            on the tokens is scaled to sum to 1 again.
        among: [B, n] int64, the tokens between which the graph is drawn, none twice; all N by
            default, and n is N. Checked to be tokens on the CPU.

    Returns:
        [B, H, n] float32 (float64 for float64). Not differentiable.

    Raises:
        TypeError: q or k are not of floating point, or bias is neither that nor boolean.
        ValueError: a shape or value does not fit; the message names the argument.
    """
    _check(q, k, iters, init, bias, prefix_k, among)
    batch, heads, n, dim = q.shape
    n = n if among is None else among.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.no_grad():
        if init is None:
            init = q.new_full((1, 1, 1), 1 / max(n, 1), dtype=wide).expand(batch, heads, n)
        else:
            init = init.to(wide).expand(batch, heads, n)
            init = init / init.sum(-1, keepdim=True)
        if bias is not None:
            bias = reference.additive(bias, wide).expand(batch, heads, n, n)
        scale = 1 / math.sqrt(dim) if scale is None else float(scale)
        # An exported program needs torch alone.
        run = reference.weighted_pagerank if exporting() else torch.ops.pcx.weighted_pagerank
        return run(q, k, init, bias, prefix_k, among, iters, scale)


def _check(q, k, iters, init, bias, prefix_k, among) -> None:
    if not (q.is_floating_point() and k.is_floating_point()):
        raise TypeError(f"q, k: {q.dtype} and {k.dtype}, expected floating point")
    if q.dim() != 4:
        raise ValueError(f"q: shape {tuple(q.shape)}, expected [B, H, N, d]")
    if k.shape != q.shape:
        raise ValueError(f"k: shape {tuple(k.shape)}, expected q's, {tuple(q.shape)}")
    named = {"k": k, "init": init, "bias": bias, "prefix_k": prefix_k, "among": among}
    for name, given in named.items():
        if given is not None and given.device != q.device:
            raise ValueError(f"{name}: on {given.device}, but q is on {q.device}")
    batch, heads, n, dim = q.shape
    if among is not None:
        _check_among(among, batch, n)
        n = among.shape[1]
    if isinstance(iters, bool) or not isinstance(iters, int) or iters < 0:
        raise ValueError(f"iters: {iters!r}, expected a whole number, 0 or more")
    if init is not None:
        if not broadcasts(init, (batch, heads, n)):
            raise ValueError(
                f"init: shape {tuple(init.shape)}, expected one that broadcasts to [B, H, n] = "
                f"{(batch, heads, n)}"
            )
        if _values_known(init) and not ((init >= 0).all() and (init.sum(-1) > 0).all()):
            raise ValueError("init: expected no negative score, and one above 0 in every head")
    if bias is not None:
        if not (bias.is_floating_point() or bias.dtype == torch.bool):
            raise TypeError(f"bias: {bias.dtype}, expected floating point or boolean")
        if not broadcasts(bias, (batch, heads, n, n)):
            raise ValueError(
                f"bias: shape {tuple(bias.shape)}, expected one that broadcasts to [B, H, n, n] = "
                f"{(batch, heads, n, n)}"
            )
    if prefix_k is not None and (prefix_k.dim() != 3 or prefix_k.shape[::2] != (heads, dim)):
        raise ValueError(
            f"prefix_k: shape {tuple(prefix_k.shape)}, expected [H, m, d] = ({heads}, m, {dim})"
        )


def _check_among(among: Tensor, batch: int, tokens: int) -> None:
    if among.dtype != torch.int64 or among.dim() != 2 or among.shape[0] != batch:
        raise ValueError(
            f"among: {among.dtype} of shape {tuple(among.shape)}, expected int64 [{batch}, n]"
        )
    if _values_known(among) and not ((among >= 0) & (among < tokens)).all():
        raise ValueError(f"among: expected tokens, 0 to {tokens - 1}")


def _values_known(x: Tensor) -> bool:
    """Without waiting for a GPU."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
