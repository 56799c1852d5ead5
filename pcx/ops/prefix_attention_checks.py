"""Checks of the arguments of `pcx.prefix_attention`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pcx.ops.checks import broadcasts, values_known


def check_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    index: Tensor | None,
    lengths: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Checks shapes, dtypes, devices and, on the CPU, the values of indices.

    Without indices and bias, what was checked once is not checked again: the checks take longer
    than a small call.

    Raises:
        TypeError, ValueError: the message names the argument, what it got and what it may be.
    """
    key = None
    kept = index is None and lengths is None and bias is None and type(q) is Tensor
    if kept and not torch.compiler.is_compiling():  # a compiled graph has no place for the set
        key = _key_of(q, k, v, prefix_k, prefix_v)
        if key in _CHECKED:
            return
    _check_all(q, k, v, prefix_k, prefix_v, index, lengths, bias)
    if key is not None and not torch.jit.is_tracing():  # whose sizes are tensors
        if len(_CHECKED) >= _MOST:
            _CHECKED.clear()
        _CHECKED.add(key)


_CHECKED: set[tuple] = set()  # shapes, dtypes and devices of calls that were right
_MOST = 1000


def _key_of(*tensors: Any) -> tuple | None:
    try:
        return tuple([x for t in tensors for x in (t.shape, t.dtype, t.device)])
    except AttributeError:
        return None  # not all are tensors


def _check_all(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    index: Tensor | None,
    lengths: Tensor | None,
    bias: Tensor | None,
) -> None:
    _check_tensors({"q": q, "k": k, "v": v, "prefix_k": prefix_k, "prefix_v": prefix_v})
    for name, tensor in {"prefix_index": index, "prefix_lengths": lengths, "bias": bias}.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.device != q.device:
            raise ValueError(
                f"{name}: on {tensor.device}, but q is on {q.device}; move them to one device"
            )
    *lead, heads, n, dim = q.shape
    own, m = k.shape[-2], prefix_k.shape[-2]
    _expect("k", k, (*lead, heads, own, dim))
    _expect("v", v, (*lead, heads, own, v.shape[-1]))
    sets = prefix_k.shape[:-3]
    _expect("prefix_k", prefix_k, (*sets, heads, m, dim))
    _expect("prefix_v", prefix_v, (*sets, heads, m, v.shape[-1]))
    _check_sets(tuple(lead), sets, m, index, lengths)
    if bias is not None:
        _check_bias(bias, q.dtype, (*lead, heads, n, own))


def _check_tensors(named: dict[str, Tensor]) -> None:
    q = named["q"]
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if type(tensor).__name__ == "DTensor":
            raise TypeError(
                f"{name}: a DTensor, whose shards the kernels do not see; shard by heads and call "
                "this on each shard, by torch.distributed.tensor.experimental.local_map"
            )
        if name.startswith("prefix") and tensor.dim() not in (3, 4):
            raise ValueError(
                f"{name}: shape {tuple(tensor.shape)}, expected [H, m, d] or [G, H, m, d]"
            )
        if tensor.dim() < 4 and not name.startswith("prefix"):
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected [..., B, H, N, d]")
        if tensor.dtype != q.dtype:
            raise TypeError(
                f"{name}: dtype {tensor.dtype}, but q has {q.dtype}; cast them to one dtype"
            )
        if tensor.device != q.device:
            raise ValueError(
                f"{name}: on {tensor.device}, but q is on {q.device}; move them to one device"
            )
    if q.shape[-1] == 0:
        raise ValueError(f"q: shape {tuple(q.shape)}, expected a head dim of at least 1")
    if not q.is_floating_point():
        raise TypeError(f"q: dtype {q.dtype}, expected a floating one")


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {shape}")


def _check_sets(
    lead: tuple[int, ...],
    sets: torch.Size,
    m: int,
    index: Tensor | None,
    lengths: Tensor | None,
) -> None:
    # A torch.Size of the same numbers would fix the sizes that an export leaves open.
    batch, count = math.prod(lead), sets[0] if sets else None
    for name, given in {"prefix_index": index, "prefix_lengths": lengths}.items():
        if given is not None and count is None:
            raise ValueError(
                f"{name}: given, but prefix_k has no set dimension [G, H, m, d]; leave it out, or "
                "give prefix sets"
            )
    if index is None or count is None:
        if count not in (None, batch):
            raise ValueError(
                f"prefix_index: needed to choose among {count} prefix sets for a batch of {batch}; "
                "give the index of each sample's set"
            )
    else:
        if tuple(index.shape) != lead or index.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"prefix_index: {index.dtype} of shape {tuple(index.shape)}, expected int64 "
                f"or int32 {list(lead)}"
            )
        _check_values("prefix_index", index, 0, count - 1)
    if lengths is not None:
        if tuple(lengths.shape) != (count,) or lengths.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"prefix_lengths: {lengths.dtype} of shape {tuple(lengths.shape)}, expected int64 "
                f"or int32 ({count},)"
            )
        _check_values("prefix_lengths", lengths, 0, m)


def _check_values(name: str, given: Tensor, low: int, high: int) -> None:
    if values_known(given) and given.numel():
        least, most = int(given.min()), int(given.max())
        if least < low or most > high:
            raise ValueError(f"{name}: values {least}..{most}, expected {low}..{high}")


def _check_bias(bias: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if not broadcasts(bias, shape):
        raise ValueError(
            f"bias: shape {tuple(bias.shape)} does not broadcast to [B, H, N, S] = {shape}; the "
            "prefix takes no bias"
        )
    if bias.dtype not in (torch.bool, torch.float32, dtype):
        raise TypeError(f"bias: dtype {bias.dtype}, expected bool, float32 or q's {dtype}")
