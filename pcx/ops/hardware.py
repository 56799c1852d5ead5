"""Facts about this machine: whether Triton is installed, and properties of its GPUs."""

from __future__ import annotations

import functools
import importlib.util

import torch

TRITON = importlib.util.find_spec("triton") is not None


@functools.cache  # torch's own call is slow
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA device, such as (9, 0)."""
    return torch.cuda.get_device_capability(device)


@functools.cache
def processors(device: torch.device) -> int:
    """The number of streaming multiprocessors (SMs) of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count
