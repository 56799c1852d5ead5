"""Attention over [keys and values shared by the batch; own keys and values]."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pcx.ops import reference, registration
from pcx.ops.backends import cannot, exporting
from pcx.ops.checks import check_prefix_attention

BACKENDS = ("auto", "cuda", "triton", "cpu", "reference")


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    prefix_index: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """Attends to a prefix shared by the batch and to each sample's own keys.

    softmax([q K_P^T, q k^T + bias] * scale) [V_P; v], which is VPT-Deep's attention seen from the
    image tokens (VPT paper, Eq. 7). Equals `F.scaled_dot_product_attention` over the concatenated
    keys and values, with the bias added after scaling as there.

    Args:
        q: [B, H, N, d]; more leading batch dimensions may stand in the place of B.
        k: [B, H, S, d].
        v: [B, H, S, dv].
        prefix_k: [H, m, d], one prefix for the whole batch, or [G, H, m, d], G prefix sets; m may
            be 0.
        prefix_v: [H, m, dv] or [G, H, m, dv].
        prefix_index: [B] int64, the set of each sample; needed with G sets unless G = B.
        prefix_lengths: [G] int64, the valid length of each set where they differ.
        bias: as SDPA's attn_mask, additive or boolean (True attends), broadcastable to [B, H, N,
            S]; the prefix has none. A row that attends to nothing gives zeros.
        scale: factor on the logits, 1 / sqrt(d) by default.
        return_lse: also return the natural log of the softmax's denominator, [B, H, N] in float32
            (float64 for float64), differentiable.
        backend: "cuda" (Hopper, 16 bits, d = 64, no bias; of the backward, the gradients of
            prefix sets that samples share are Triton's), "triton" (any
            other on CUDA), "cpu" (C++), "reference" (torch, by concatenation), or "auto": the
            first of these on CUDA that can run, "cuda" only where it is faster, and torch
            elsewhere, which is faster there but for the LSE. The first three give the same bits on
            every run and have no second derivative.

    Returns:
        [B, H, N, dv], with the LSE as a second item where asked for.

    Raises:
        TypeError: an argument is no tensor, or dtypes differ outside autocast.
        ValueError: a shape, device, index or backend does not fit, or the backend asked for cannot
            run; the message names the argument.
    """
    q, k, v, prefix_k, prefix_v, bias = _autocast(q, k, v, prefix_k, prefix_v, bias)
    check_prefix_attention(q, k, v, prefix_k, prefix_v, prefix_index, prefix_lengths, bias)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    lead = q.shape[:-3]
    if bias is not None:
        bias = _five_dimensions(bias, lead)
    if prefix_index is not None:
        prefix_index = prefix_index.reshape(-1)
    if len(lead) != 1:
        q, k, v = q.flatten(0, -4), k.flatten(0, -4), v.flatten(0, -4)
    tensors = (q, k, v, prefix_k, prefix_v)
    chosen = _choose(backend, *tensors, bias, scale)
    if chosen == "reference":
        found = reference.prefix_attention(
            *tensors,
            prefix_index=prefix_index,
            prefix_lengths=prefix_lengths,
            bias=None if bias is None else _four_dimensions(bias, tensors[0].shape[0]),
            scale=scale,
            return_lse=return_lse,
        )
        out, lse = found if return_lse else (found, None)
    else:
        _assert_later(prefix_index, prefix_lengths, prefix_k)
        out, lse = torch.ops.pcx.prefix_attention.default(
            *tensors, prefix_index, prefix_lengths, bias, scale, chosen
        )
    if len(lead) != 1:
        out, lse = out.unflatten(0, lead), None if lse is None else lse.unflatten(0, lead)
    return (out, lse) if return_lse else out


def _choose(backend: str, *arguments) -> str:
    """The backend to call the operation with; "auto" leaves what CUDA runs to the call itself."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, expected one of {BACKENDS}")
    if backend == "auto":
        if exporting() or arguments[0].device.type != "cuda":
            return "reference"  # the exported program then needs torch alone
        return "reference" if cannot("triton", *arguments) else "auto"
    reason = cannot(backend, *arguments)
    if reason:
        raise ValueError(f"backend: {backend!r} cannot run: {reason}")
    return backend


def _autocast(*tensors: Tensor | None) -> tuple:
    """Casts as SDPA's own autocast does; boolean masks stay."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta knows no autocast
        return tensors
    dtype = torch.get_autocast_dtype(device)
    if all(t is None or (isinstance(t, Tensor) and t.dtype is dtype) for t in tensors):
        return tensors
    return tuple(
        t.to(dtype)
        if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        else t
        for t in tensors
    )


def _assert_later(index: Tensor | None, lengths: Tensor | None, prefix: Tensor) -> None:
    """Checks values on a GPU without waiting for them; the kernels clamp what it finds."""
    named = {
        "prefix_index": (index, prefix.shape[0] - 1, "0..G-1"),
        "prefix_lengths": (lengths, prefix.shape[-2], "0..m"),
    }
    for name, (values, last, allowed) in named.items():
        if values is not None and values.is_cuda:
            fits = ((values >= 0) & (values <= last)).all()
            torch._assert_async(fits, f"{name}: a value lies outside of {allowed}")


def _five_dimensions(bias: Tensor, lead: torch.Size) -> Tensor:
    """As [B0 | 1, B1 | 1, H | 1, N | 1, S | 1] with B0 * B1 samples in all.

    A bias that is the same along some neighbouring batch dimensions, as Swin's is for all images
    of a batch of windows, is not expanded along them.
    """
    bias = bias.reshape((1,) * (len(lead) + 3 - bias.dim()) + bias.shape)
    own = bias.shape[:-3]
    front = next((i for i, size in enumerate(own) if size > 1), len(own))
    if tuple(own[front:]) == tuple(lead[front:]):  # the same along the first dimensions
        return bias.flatten(0, -4)[None]
    back = next((i for i in reversed(range(len(own))) if own[i] > 1), -1) + 1
    if tuple(own[:back]) == tuple(lead[:back]):  # the same along the last
        return bias.flatten(0, -4)[:, None]
    return bias.expand(*lead, *bias.shape[-3:]).flatten(0, -4)[:, None]


def _four_dimensions(bias: Tensor, batch: int) -> Tensor:
    outer, inner = registration.batches(bias, batch)
    if bias.shape[:2] == (1, 1):
        return bias[0]
    return bias.expand(outer, inner, *bias.shape[2:]).flatten(0, 1)
