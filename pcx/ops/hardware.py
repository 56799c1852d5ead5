"""What this machine has: Triton, and properties of its GPUs."""

from __future__ import annotations

import functools
import importlib.util

import torch

TRITON = importlib.util.find_spec("triton") is not None


@functools.cache  # torch's own takes a while
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA device, such as (9, 0)."""
    return torch.cuda.get_device_capability(device)


@functools.cache
def processors(device: torch.device) -> int:
    """How many streaming multiprocessors (SMs) a CUDA device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count
