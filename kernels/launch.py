"""Helpers that the launch of every Triton kernel needs."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from pcx.ops.hardware import capability


def rowwise(x: Tensor) -> Tensor:
    """A tensor with dense rows at an address that Triton treats as aligned in every call.

    Rows of a multiple of 8 elements begin on multiples of 8 elements, which kernels rely on.
    """
    off = x.shape[-1] % 8 == 0 and any(step % 8 for step in x.stride()[:-1])
    if off or x.data_ptr() % 16:
        return x.clone(memory_format=torch.contiguous_format)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def on_device(x: Tensor) -> Any:
    """Makes the tensor's device current, since Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def products_of_warps(x: Tensor) -> bool:
    """Whether tensor cores have mma.sync alone: all GPUs but Hopper and datacentre Blackwell.

    There a tile has fewer registers than with wgmma or tcgen05.
    """
    return x.is_cuda and capability(x.device)[0] not in (9, 10)
