"""The torch library "pcx" that every op is defined in, and the compiled part pcx._C.

Each op's file defines its schema, its fake and its gradient in Python, so that they exist without
the compiled part. pcx._C adds implementations to them: C++ for the CPU, and CUDA C++ where it was
built with nvcc.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("pcx", "FRAGMENT")
SCHEMAS = 12  # moves with every change of an op's schema, as kSchemas in csrc/operations.h


def token_major(like: Tensor, tokens: int, dim: int) -> Tensor:
    """[B, H, tokens, dim] over memory [B, tokens, H, dim], as all backends give it."""
    return like.new_empty(like.shape[0], tokens, like.shape[1], dim).transpose(1, 2)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of scores and sums: float64 for float64, float32 for every other type."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _load() -> frozenset[str]:
    """What the compiled part, where there is one, has kernels for: "cpu", "cuda"."""
    try:
        _C: Any = importlib.import_module("pcx._C")
    except ModuleNotFoundError:
        return frozenset()
    except ImportError as error:  # it is there, and built for another torch or CUDA
        warnings.warn(f"pcx._C does not load and is left out: {error}", stacklevel=2)
        return frozenset()
    info = _C.build_info()
    if info.get("schemas") != SCHEMAS:
        warnings.warn(
            f"{_C.__file__} is of another version of pcx and is left out: build it again with "
            "`pip install --no-build-isolation -e .`",
            stacklevel=2,
        )
        return frozenset()
    _C.register_operations()
    return frozenset({"cpu", "cuda"} if info["cuda"] else {"cpu"})


EXTENSION = _load()
