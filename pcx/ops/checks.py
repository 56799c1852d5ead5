"""Checks and limits that several ops share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Limits of the Triton kernels of attention and PageRank: dtypes, the largest head dim, and the
# largest offset between elements, which is kept in 32 bits.
TRITON_TYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_DIM, MOST_OFFSET = 128, 2**31 - 1


def triton_cannot_attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    """The reason why Triton's kernels cannot compute this attention, or None if they can.

    The tensors are [B, H, N, d].
    """
    if q.dtype not in TRITON_TYPES:
        return f"it computes bfloat16, float16 and float32, q has {q.dtype}"
    if q.shape[-1] != v.shape[-1]:
        return f"it needs d = dv, got {q.shape[-1]} and {v.shape[-1]}"
    if q.shape[-1] > MOST_DIM:
        return f"it needs d <= {MOST_DIM}, got {q.shape[-1]}"
    for name, tensor in {"q": q, "k": k, "v": v}.items():
        if any((tensor.shape[i] - 1) * tensor.stride(i) > MOST_OFFSET for i in (-3, -2)):
            return f"the heads or tokens of {name} lie 2**31 elements apart"
    if not scale >= torch.finfo(torch.float32).tiny:
        return f"it needs scale > 0, got {scale}"
    if k.shape[-2] == 0:
        return "it needs own keys, S is 0"
    return None


def broadcasts(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a tensor broadcasts to exactly this shape."""
    try:
        return tuple(torch.broadcast_shapes(tensor.shape, shape)) == shape
    except RuntimeError:
        return False


def values_known(x: Tensor) -> bool:
    """Whether a check may read a tensor's values.

    It may on the CPU, outside of torch.compile and of torch.func's transforms. On a GPU a check
    would wait for the device.
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed()


def transformed() -> bool:
    """Whether a call is under torch.func's transforms or in forward mode.

    Kernels have no rules for these, so that ops compute such calls by torch's own functions.
    """
    if torch.compiler.is_compiling():  # which refuses what it cannot trace
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
