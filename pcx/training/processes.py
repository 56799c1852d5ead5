"""Several processes that train one model: the same start, and the mean of their gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Together:
    """Keeps the models of several processes alike.

    What is trained of a tuned model is small, so that its gradients travel as one flat tensor of
    each dtype, after the backward pass. Nothing hooks into the backward pass, which a CUDA graph
    can then hold.

    Args:
        processes: how many there are; nothing is done for one.
        model: whose parameters and buffers all processes get from the first.
        parameters: those whose gradients are averaged.
    """

    def __init__(self, processes: int, model: nn.Module, parameters: Iterable[nn.Parameter]):
        self.processes = processes
        self.parameters = list(parameters)
        self.buffers = list(model.buffers()) if processes > 1 else []
        if processes > 1:
            self._from_first([*(p.detach() for p in model.parameters()), *self.buffers])

    @torch.no_grad()
    def average_gradients(self) -> None:
        """Replaces every gradient by its mean over the processes, and buffers by the first's."""
        if self.processes == 1:
            return
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        for alike in _by_dtype(gradients):
            flat = torch.cat([g.reshape(-1) for g in alike])
            torch.distributed.all_reduce(flat)
            flat /= self.processes
            parts = flat.split([g.numel() for g in alike])
            torch._foreach_copy_(alike, [p.view_as(g) for p, g in zip(parts, alike, strict=True)])
        self._from_first(self.buffers)

    @staticmethod
    def _from_first(tensors: list[Tensor]) -> None:
        for tensor in tensors:
            torch.distributed.broadcast(tensor, 0)


def _by_dtype(tensors: list[Tensor]) -> list[list[Tensor]]:
    found: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.dtype, []).append(tensor)
    return list(found.values())
