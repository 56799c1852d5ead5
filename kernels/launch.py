"""What the launch of any Triton kernel needs."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from pcx.ops.hardware import capability


def rowwise(x: Tensor) -> Tensor:
    """With dense rows, from an address that Triton takes for aligned in every call."""
    if x.data_ptr() % 16:
        return x.clone(memory_format=torch.contiguous_format)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def on_device(x: Tensor) -> Any:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def products_of_warps(x: Tensor) -> bool:
    """Tensor cores there have mma.sync alone, which leaves a tile fewer registers than wgmma and
    tcgen05 do: all GPUs but Hopper and datacentre Blackwell."""
    return x.is_cuda and capability(x.device)[0] not in (9, 10)
