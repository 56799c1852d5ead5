"""Which backends of `prefix_attention` can run on given arguments, and why others cannot."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from pcx.ops import registration

TRITON = importlib.util.find_spec("triton") is not None
# What Triton's kernels over heads' rows compute: types, head dims, and offsets of 32 bits.
TYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_DIM, MOST_OFFSET = 128, 2**31 - 1


def cannot(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    bias: Tensor | None,
    scale: float,
) -> str | None:
    """None where the backend can run on checked arguments, or the reason why it cannot."""
    if backend == "cuda":
        return _cuda_cannot(q, k, v, scale)
    if backend == "triton":
        return _triton_cannot(q, k, v, scale)
    if backend == "cpu":
        return cpu_cannot(q, k)
    return None


def _cuda_cannot(q, k, v, scale: float) -> str | None:
    """What csrc/cuda/prefix_attention.cpp finds wrong beside, the call itself says."""
    reason = _triton_cannot(q, k, v, scale)  # which gives what the CUDA kernels leave
    if reason is None and "cuda" not in registration.EXTENSION:
        return "pcx was installed without its CUDA kernels"
    return reason


@functools.cache  # torch's own takes a while
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _triton_cannot(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    if q.device.type != "cuda":
        return f"it needs CUDA tensors, q is on {q.device.type}"
    if not TRITON:
        return "triton is not installed"
    if q.dtype not in TYPES:
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


def pagerank_in_triton(q: Tensor, k: Tensor, bias: Tensor | None, prefix_k: Tensor | None) -> bool:
    """Whether Triton's kernels take checked arguments of `weighted_pagerank` on CUDA."""
    rows = [x for x in (q, k, prefix_k) if x is not None]
    reach = [(x.shape[-2] - 1) * x.stride(-2) for x in rows]
    if bias is not None:
        reach.append((bias.shape[-1] - 1) * (bias.stride(-2) + bias.stride(-1)))
    return (
        TRITON
        and q.dtype in TYPES
        and all(x.dtype == q.dtype for x in rows)
        and q.shape[-1] <= MOST_DIM
        and max(reach) <= MOST_OFFSET
    )


def cpu_cannot(q: Tensor, k: Tensor) -> str | None:
    if q.device.type != "cpu":
        return f"it needs CPU tensors, q is on {q.device.type}"
    if "cpu" not in registration.EXTENSION:
        return "pcx was installed without its compiled extension pcx._C"
    if q.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        return f"it computes float32, float64 and bfloat16, q has {q.dtype}"
    if k.shape[-2] == 0:
        return "it needs own keys, S is 0"
    return None


def exporting() -> bool:
    """`torch.compiler.is_exporting()`, which in torch 2.11 is true of all that is compiled."""
    return torch.compiler._is_exporting_flag
