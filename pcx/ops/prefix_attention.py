"""Attention over [keys and values shared by the batch; own keys and values]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pcx.ops import reference

BACKENDS = ("auto", "reference")


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
    keys and values.

    Args:
        q: [B, H, N, d].
        k: [B, H, S, d].
        v: [B, H, S, dv].
        prefix_k: [H, m, d], one prefix for the whole batch, or [G, H, m, d], G prefix sets; m may
        be 0.
        prefix_v: [H, m, dv] or [G, H, m, dv].
        prefix_index: [B] int64, the set of each sample; needed with G sets unless G = B.
        prefix_lengths: [G] int64, the valid length of each set where they differ.
        bias: as SDPA's attn_mask, additive or boolean (True attends), broadcastable to [B, H, N,
            S]; the prefix has none.
        scale: factor on the logits, 1 / sqrt(d) by default.
        return_lse: also return the natural log of the softmax's denominator, [B, H, N].
        backend: "auto" or "reference" (torch).

    Returns:
        [B, H, N, dv], with the LSE as a second item where asked for.

    Raises:
        TypeError: an argument is no tensor, or dtypes differ outside autocast.
        ValueError: a shape, device, index or backend does not fit; the message names the argument.
    """
    q, k, v, prefix_k, prefix_v, bias = _autocast(q, k, v, prefix_k, prefix_v, bias)
    _check(q, k, v, prefix_k, prefix_v, prefix_index, prefix_lengths, bias)
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, expected one of {BACKENDS}")
    return reference.prefix_attention(
        q,
        k,
        v,
        prefix_k,
        prefix_v,
        prefix_index=prefix_index,
        prefix_lengths=prefix_lengths,
        bias=bias,
        scale=scale,
        return_lse=return_lse,
    )


def _autocast(*tensors: Tensor | None) -> tuple:
    """Casts as SDPA's own autocast does; boolean masks stay."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta knows no autocast
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype)
        if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        else t
        for t in tensors
    )


def _check(q, k, v, prefix_k, prefix_v, index, lengths, bias) -> None:
    named = {"q": q, "k": k, "v": v, "prefix_k": prefix_k, "prefix_v": prefix_v}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        ranks = (3, 4) if name.startswith("prefix") else (4,)
        if tensor.dim() not in ranks:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected rank {ranks}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}: dtype {tensor.dtype}, but q has {q.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name}: on {tensor.device}, but q is on {q.device}")
    batch, heads, _, dim = q.shape
    own, m = k.shape[2], prefix_k.shape[-2]
    _expect("k", k, (batch, heads, own, dim))
    _expect("v", v, (batch, heads, own, v.shape[3]))
    sets = prefix_k.shape[:-3]
    _expect("prefix_k", prefix_k, (*sets, heads, m, dim))
    _expect("prefix_v", prefix_v, (*sets, heads, m, v.shape[3]))
    _check_sets(batch, sets, index, lengths)
    for name, tensor in {"prefix_index": index, "prefix_lengths": lengths, "bias": bias}.items():
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if bias is not None:
        try:
            fits = torch.broadcast_shapes(bias.shape, (batch, heads, q.shape[2], own)) == (
                batch,
                heads,
                q.shape[2],
                own,
            )
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"bias: shape {tuple(bias.shape)} does not broadcast to [B, H, N, S] = "
                f"{(batch, heads, q.shape[2], own)}; the prefix takes no bias"
            )


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {shape}")


def _check_sets(batch: int, sets: torch.Size, index: Tensor | None, lengths: Tensor | None) -> None:
    count = sets[0] if sets else None
    if index is None:
        if lengths is not None and count is None:
            raise ValueError(
                "prefix_lengths: given, but prefix_k has no set dimension [G, H, m, d]"
            )
        if count not in (None, batch):
            raise ValueError(
                f"prefix_index: needed to choose among {count} prefix sets for a batch of {batch}"
            )
    else:
        if count is None:
            raise ValueError("prefix_index: given, but prefix_k has no set dimension [G, H, m, d]")
        if tuple(index.shape) != (batch,) or index.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"prefix_index: {index.dtype} of shape {tuple(index.shape)}, expected int64 "
                f"[{batch}]"
            )
        if index.device.type == "cpu" and batch and not torch.compiler.is_compiling():
            low, high = int(index.min()), int(index.max())
            if low < 0 or high >= count:
                raise ValueError(f"prefix_index: values {low}..{high}, expected 0..{count - 1}")
    if lengths is not None and (tuple(lengths.shape) != (count,) or lengths.is_floating_point()):
        raise ValueError(
            f"prefix_lengths: {lengths.dtype} of shape {tuple(lengths.shape)}, expected int64 "
            f"({count},)"
        )
