"""Copies of modules that share frozen memory."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn


def over_same_memory(module: nn.Module, parameters: Iterable[nn.Parameter]) -> Any:
    """Copies a module tree; the given parameters are frozen in the copy and share memory.

    They are parameters of their own, so that moving or freezing one tree leaves the other alone.
    """
    memo = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in parameters}
    return copy.deepcopy(module, memo)
