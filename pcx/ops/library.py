"""The torch library "pcx", which holds every op, and the compiled extension pcx._C.

Each op's file defines its schema, its fake and its gradient in Python, so that the op exists
without the extension. pcx._C adds implementations: C++ for the CPU, and CUDA C++ if it was built
with nvcc.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("pcx", "FRAGMENT")
# Version of the ops' schemas. It goes up with every change of a schema, together with kSchemas in
# csrc/operations.h.
SCHEMAS = 15


def token_major(like: Tensor, tokens: int, dim: int) -> Tensor:
    """An empty [B, H, tokens, dim] with memory in the order [B, tokens, H, dim].

    All backends of attention return this layout.
    """
    return like.new_empty(like.shape[0], tokens, like.shape[1], dim).transpose(1, 2)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores and sums: float64 for float64, float32 for every other dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(kind: str) -> torch.dtype | None:
    """The dtype of autocast on a type of device; None where it is off, as on meta tensors."""
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def read_in(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a matrix product reads a tensor of `dtype` on the device of x.

    That is autocast's where it is on, which leaves float64 and integers alone.
    """
    if dtype == torch.float64 or not dtype.is_floating_point:
        return dtype
    return autocast_dtype(x.device.type) or dtype


def _load() -> frozenset[str]:
    """Loads the extension, and returns the devices that it has kernels for: "cpu", "cuda".

    An extension that is missing, does not load, or has other schemas gives an empty set.
    """
    try:
        _C: Any = importlib.import_module("pcx._C")
    except ModuleNotFoundError:
        return frozenset()
    except ImportError as error:  # built for another torch or CUDA
        warnings.warn(
            f"pcx._C does not load and is left out: {error}; build it again with "
            "`pip install --no-build-isolation -e .`",
            stacklevel=2,
        )
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
