"""Copies of modules that share frozen memory."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn


def over_same_memory(module: nn.Module, parameters: Iterable[nn.Parameter]) -> Any:
    """A copy of a module tree, some of whose parameters, frozen, lie in the same memory.

    They are parameters of their own, so that moving or freezing one tree leaves the other alone.
    """
    memo = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in parameters}
    return copy.deepcopy(module, memo)
