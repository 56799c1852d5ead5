"""Copies of modules that share frozen memory."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def over_same_memory(module: nn.Module, parameters: Iterable[nn.Parameter]) -> Any:
    """Copies a module tree; the given parameters are frozen in the copy and share memory.

    They are parameters of their own, so that moving or freezing one tree leaves the other alone.
    What a forward with gradients has left in a cache, as timm's TinyViT keeps its biases, is not
    copied.
    """
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in parameters
    }
    for part in module.modules():
        memo |= {id(value): {} for name, value in vars(part).items() if _is_cache(name, value)}
    return copy.deepcopy(module, memo)


def _is_cache(name: str, value: Any) -> bool:
    """Whether an attribute of a module is a dict of what was computed with gradients."""
    if name.startswith("_") or not isinstance(value, dict):  # torch's own begin with "_"
        return False
    return any(isinstance(each, Tensor) and not each.is_leaf for each in value.values())
