"""Weighted PageRank over the graph whose edges are the attention weights between tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pcx.arguments import real_number, whole_number
from pcx.ops import hardware
from pcx.ops.checks import MOST_DIM, MOST_OFFSET, TRITON_TYPES, broadcasts, values_known
from pcx.ops.dispatch import Backend, Dispatch, exporting
from pcx.ops.library import EXTENSION, LIBRARY, wide
from pcx.ops.reference import weighted_pagerank as reference
from pcx.ops.reference.attention import additive, tokens


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
    backend: str = "auto",
) -> Tensor:
    """Importance of tokens: s <- A^T s with A = softmax(q k^T scale) (Zero-TPrune, Algorithm 1).

    A token is important if important tokens attend to it. The scores of a head sum to 1 before and
    after every iteration. Where no score flows to any token, all tokens get the same.

    Args:
        q, k: [B, H, N, d], of the same N tokens.
        iters: number of iterations, 0 or more.
        init: initial scores, broadcastable to [B, H, n], 0 or more. They are scaled to sum to 1.
            Uniform by default.
        scale: factor on the logits, 1/sqrt(d) by default.
        bias: as SDPA's attn_mask, additive or boolean, broadcastable to [B, H, n, n].
        prefix_k: [H, m, d], further keys that every token attends to, such as prompts. They are
            sinks: each iteration takes the score that flows to them out of the graph, and scales
            the tokens' scores to sum to 1 again.
        among: [B, n] int64, the tokens of the graph, none twice. By default they are all N tokens,
            and n is N. Their range is checked on the CPU alone.
        backend: "cuda" (no bias, no prefix, up to 208 tokens, on Hopper 272), "triton" (every other
            call on CUDA), "cpu" (C++) or "reference" (torch, which stores the attention matrix).
            "auto" is the first of these that can run.

    Returns:
        [B, H, n] float32 (float64 for float64). The scores are not differentiable.

    Raises:
        TypeError: q or k is not floating point, or bias is neither floating point nor boolean.
        ValueError: a shape or value does not fit, or the backend asked for cannot run; the message
            names the argument.
    """
    iters = whole_number("iters", iters)
    _check(q, k, init, bias, prefix_k, among)
    batch, heads, n, dim = q.shape
    n = n if among is None else among.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.no_grad():
        if init is None:
            init = q.new_full((1, 1, 1), 1 / max(n, 1), dtype=dtype).expand(batch, heads, n)
        else:
            init = init.to(dtype).expand(batch, heads, n)
            init = init / init.sum(-1, keepdim=True)
        if bias is not None:
            bias = additive(bias, dtype).expand(batch, heads, n, n)
        if scale is None:
            scale = 1 / math.sqrt(dim)
        elif not torch.compiler.is_compiling():  # else its value is not known
            scale = real_number("scale", scale)
        arguments = (q, k, init, bias, prefix_k, among, iters, scale)
        run = DISPATCH.own_run(backend, *arguments)
        if run is None:  # an exported program needs torch alone
            run = reference.weighted_pagerank if exporting() else torch.ops.pcx.weighted_pagerank
        return run(*arguments)


def _check(q, k, init, bias, prefix_k, among) -> None:
    if not (q.is_floating_point() and k.is_floating_point()):
        raise TypeError(f"q, k: {q.dtype} and {k.dtype}, expected floating point")
    if q.dim() != 4:
        raise ValueError(f"q: shape {tuple(q.shape)}, expected [B, H, N, d]")
    if k.shape != q.shape:
        raise ValueError(f"k: shape {tuple(k.shape)}, expected q's, {tuple(q.shape)}")
    named = {"k": k, "init": init, "bias": bias, "prefix_k": prefix_k, "among": among}
    for name, given in named.items():
        if given is not None and given.device != q.device:
            raise ValueError(
                f"{name}: on {given.device}, but q is on {q.device}; move them to one device"
            )
    batch, heads, n, dim = q.shape
    if among is not None:
        _check_among(among, batch, n)
        n = among.shape[1]
    if init is not None:
        if not broadcasts(init, (batch, heads, n)):
            raise ValueError(
                f"init: shape {tuple(init.shape)}, expected one that broadcasts to [B, H, n] = "
                f"{(batch, heads, n)}"
            )
        if values_known(init) and not ((init >= 0).all() and (init.sum(-1) > 0).all()):
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
    if values_known(among) and not ((among >= 0) & (among < tokens)).all():
        raise ValueError(
            f"among: values {int(among.min())} to {int(among.max())}, expected tokens, 0 to "
            f"{tokens - 1}"
        )


def _triton_cannot(q, k, init, bias, prefix_k, *_) -> str | None:
    rows = [x for x in (q, k, prefix_k) if x is not None]
    reach = [(x.shape[-2] - 1) * x.stride(-2) for x in rows]
    if bias is not None:
        reach.append((bias.shape[-1] - 1) * (bias.stride(-2) + bias.stride(-1)))
    if q.dtype not in TRITON_TYPES:
        return f"it computes bfloat16, float16 and float32, q has {q.dtype}"
    if any(x.dtype != q.dtype for x in rows):
        return f"it needs q, k and prefix_k of one dtype, got {[x.dtype for x in rows]}"
    if q.shape[-1] > MOST_DIM:
        return f"it needs d <= {MOST_DIM}, got {q.shape[-1]}"
    if max(reach) > MOST_OFFSET:
        return "the tokens of q, k, prefix_k or bias lie 2**31 elements apart"
    return None


# The "_cuda" and "_triton" ops are the kernels alone. The op without a suffix passes calls that the
# CUDA kernels cannot run to "_triton", and that passes calls that it cannot run to the reference.
for _kernels in ("", "_cuda", "_triton"):
    LIBRARY.define(
        f"weighted_pagerank{_kernels}(Tensor q, Tensor k, Tensor init, Tensor? bias, "
        "Tensor? prefix_k, Tensor? among, int iters, float scale) -> Tensor"
    )

DISPATCH = Dispatch(
    "q",
    # The limits of the "cuda" kernels are checked in csrc/cuda/weighted_pagerank_host.cpp.
    Backend("cuda", "cuda", ("cuda extension",), (8, 9), run=torch.ops.pcx.weighted_pagerank_cuda),
    Backend(
        "triton",
        "cuda",
        ("triton",),
        can_run=_triton_cannot,
        run=torch.ops.pcx.weighted_pagerank_triton,
    ),
    Backend("cpu", "cpu", ("cpu extension",), run=torch.ops.pcx.weighted_pagerank),
    Backend("reference", run=reference.weighted_pagerank),
)


@torch.library.register_fake("pcx::weighted_pagerank", lib=LIBRARY)
@torch.library.register_fake("pcx::weighted_pagerank_cuda", lib=LIBRARY)
@torch.library.register_fake("pcx::weighted_pagerank_triton", lib=LIBRARY)
def _fake(q, k, init, bias, prefix_k, among, iters, scale):
    return q.new_empty(init.shape, dtype=wide(q.dtype))


@torch.library.impl(LIBRARY, "weighted_pagerank", "CompositeExplicitAutograd")
def _anywhere(*arguments):
    return reference.weighted_pagerank(*arguments)


@torch.library.impl(LIBRARY, "weighted_pagerank_triton", "CUDA")
def _in_triton(q, k, init, bias, prefix_k, among, iters, scale):
    if not hardware.TRITON or _triton_cannot(q, k, init, bias, prefix_k):
        return reference.weighted_pagerank(q, k, init, bias, prefix_k, among, iters, scale)
    from pcx.kernels.weighted_pagerank import weighted_pagerank as run

    if among is not None:
        q, k = tokens(q, among), tokens(k, among)
    return run(q, k, init, bias, prefix_k, iters, scale)


if "cuda" not in EXTENSION:
    LIBRARY.impl("weighted_pagerank", _in_triton, "CUDA")
