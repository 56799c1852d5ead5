"""Optimisers whose step a CUDA graph can hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def make_recordable(optimizer: torch.optim.Optimizer) -> bool:
    """Sets an optimiser up so that its step keeps all that changes in tensors, where it can.

    torch's own optimisers have a form for that, "capturable" or "fused", which is used on CUDA
    whether or not the step is recorded, so that both give the same bits.

    Returns:
        Whether the optimiser has such a form.
    """
    own = type(optimizer).__module__.startswith("torch.optim")
    if own and "capturable" in optimizer.defaults:
        form = {"capturable": True}
    elif type(optimizer) is torch.optim.SGD:
        form = {"fused": True, "foreach": False}
    else:
        return False
    for group in optimizer.param_groups:
        group.update(form)
    return True


class Rates:
    """Hands an optimiser the learning rates that a schedule sets, in tensors where it is recorded.

    A recorded step reads the rates from tensors; numbers would be those of the recording for ever.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, recordable: bool):
        self.optimizer = optimizer
        self.tensors: list[Tensor] = []
        if recordable:
            self.tensors = [torch.zeros((), device=device) for _ in optimizer.param_groups]

    def hand_over(self) -> float:
        """Puts the rates that the schedule has set into the tensors; gives the first of them."""
        groups = self.optimizer.param_groups
        rates = [float(group["lr"]) for group in groups]
        if self.tensors:
            for group, rate, tensor in zip(groups, rates, self.tensors, strict=True):
                group["lr"] = tensor.fill_(rate)
        return rates[0]


class Gradients:
    """Gradients of several batches, for one update by their mean.

    Args:
        wanted: how many batches an update takes.

    Attributes:
        count: of batches whose gradients wait.
    """

    def __init__(self, wanted: int):
        self.wanted, self.count = wanted, 0
        self._sum: list[Tensor | None] = []

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Adds those of a batch, in the order of the parameters; the tensors may be kept."""
        self._sum = [
            b if a is None else a if b is None else a + b
            for a, b in zip(self._sum or [None] * len(gradients), gradients, strict=True)
        ]
        self.count += 1

    def mean(self) -> list[Tensor | None]:
        """Their mean; none wait behind it."""
        found, self._sum = self._sum, []
        if self.count > 1:
            found = [None if g is None else g / self.count for g in found]
        self.count = 0
        return found


FORMS = ("capturable", "fused", "foreach")


def plain_state(optimizer: torch.optim.Optimizer) -> dict:
    """The optimiser's state with numbers for rates, as a file holds it."""
    state = optimizer.state_dict()
    groups = [{**group, "lr": float(group["lr"])} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def load_plain(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Loads what `plain_state` gave, whatever device it was saved on."""
    forms = [{k: v for k, v in g.items() if k in FORMS} for g in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, form in zip(optimizer.param_groups, forms, strict=True):
        group.update(form)
