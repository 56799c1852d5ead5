"""Copies of modules that share frozen memory, and tensors that become a model's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn


def over_same_memory(module: nn.Module, parameters: Iterable[nn.Parameter]) -> Any:
    """Copies a module tree; the given parameters are frozen in the copy and share memory.

    They are parameters of their own, so that moving or freezing one tree leaves the other alone.
    """
    memo = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in parameters}
    return copy.deepcopy(module, memo)


def clone_tensors(
    module: nn.Module, prefix: str, wanted: Callable[[str], bool], like: Tensor | None = None
) -> set[str]:
    """Puts a module's parameters into memory of their own, to be trained there.

    Args:
        module: changed: its parameters are replaced by copies that require gradients.
        prefix: put before the names, with a dot at its end unless it is empty.
        wanted: of a name, whether that tensor is cloned.
        like: the device and dtype of the copies; by default each one's own.

    Returns:
        The names of the parameters that were cloned and of the buffers that are wanted. Buffers lie
        in memory of their own in every copy.
    """
    found, copies = set(), dict[int, nn.Parameter]()
    for path, part in module.named_modules():
        start = f"{prefix}{path}." if path else prefix
        for name, parameter in list(part._parameters.items()):
            if parameter is None or not wanted(start + name):
                continue
            if id(parameter) not in copies:  # tied parameters stay tied
                values = parameter.detach()
                values = values.clone() if like is None else values.to(like, copy=True)
                copies[id(parameter)] = nn.Parameter(values)
            setattr(part, name, copies[id(parameter)])
            found.add(start + name)
        found |= {start + name for name in part._buffers if wanted(start + name)}
    return found
