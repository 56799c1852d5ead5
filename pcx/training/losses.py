"""Losses of a pass: their sum, and where one is no longer finite."""

from __future__ import annotations

import math
from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

LOOK_EVERY = 10  # steps between looks at the losses


class NonFiniteLoss(FloatingPointError):
    """The loss became NaN or infinite."""


class NonFiniteInput(NonFiniteLoss):
    """The loss is NaN or infinite because an image is."""


OF_INPUT = -math.inf  # stands for the loss of a sample whose image is not finite


def seen_losses(losses: Tensor, images: Any) -> Tensor:
    """Losses [B] without gradients, with `OF_INPUT` for samples whose images are not finite.

    It waits for no GPU, and can be recorded.
    """
    found = losses.detach()
    for tensor in tree_leaves(images):
        if not isinstance(tensor, Tensor) or tensor.shape[:1] != found.shape:
            continue
        if tensor.is_floating_point():
            wide = torch.promote_types(tensor.dtype, torch.float32)
            dims = tuple(range(1, tensor.dim()))  # without a copy of images in channels_last
            total = tensor.sum(dims, dtype=wide) if dims else tensor
            broken = ~total.isfinite()  # as one term is not
            found = found.masked_fill(broken & ~found.isfinite(), OF_INPUT)
    return found


class _Look(NamedTuple):
    first: int  # step of the first row
    sizes: list[int]  # samples of each step
    rows: Tensor  # on the CPU, the steps' losses one after another, float64
    arrived: torch.cuda.Event | None


class Losses:
    """Adds up the losses of a pass without holding a GPU up.

    Every `LOOK_EVERY` steps the losses are sent to the CPU, and those that were sent before are
    looked at. A loss that is not finite is noticed at most 2 * `LOOK_EVERY` steps later.

    Args:
        where: what the pass is called in messages.

    Attributes:
        samples: added so far.
    """

    def __init__(self, where: str):
        self.where = where
        self.samples = 0
        self._steps = 0
        self._looked_at = 0  # samples
        self._sum = 0.0
        self._recent: list[Tensor] = []
        self._sent: deque[_Look] = deque()

    def add(self, losses: Tensor) -> None:
        """Adds a step's losses [B].

        Raises:
            NonFiniteLoss: a loss of an earlier step is not finite; the message says which.
        """
        self._recent.append(losses.detach())
        self.samples += len(losses)
        self._steps += 1
        if len(self._recent) == LOOK_EVERY:
            self._send()
            while len(self._sent) > 1:
                self._look()

    def look(self) -> None:
        """Looks at all losses that were added, which waits for the GPU.

        Raises:
            NonFiniteLoss: as `add` raises it.
        """
        if self._recent:
            self._send()
        while self._sent:
            self._look()

    def mean(self) -> float:
        """The mean over the samples of all steps.

        Raises:
            NonFiniteLoss: as `add` raises it.
            ValueError: there was no sample.
        """
        self.look()
        if not self.samples:
            raise ValueError("loader: it yielded no sample")
        return self._sum / self.samples

    def error(self, value: float, step: int, row: int, sample: int) -> Exception:
        """The error for a loss that is not finite, by its step and sample in this pass.

        Args:
            value: the loss, or `OF_INPUT`.
            step: of the pass, from 0.
            row: of the sample in the batch of that step.
            sample: of the pass, from 0.
        """
        if value == OF_INPUT:
            return NonFiniteInput(
                f"loader: image {row} of the batch has values that are NaN or infinite, in "
                f"{self.where}, step {step + 1} (sample {sample} as read); mend or leave it out"
            )
        return NonFiniteLoss(f"{value} in {self.where}, step {step + 1}")

    def _send(self) -> None:
        steps, self._recent = self._recent, []
        sizes, rows = [len(each) for each in steps], torch.cat(steps).double()
        first = self._steps - len(steps)
        if rows.is_cuda:
            sent = rows.to("cpu", non_blocking=True)
            arrived = torch.cuda.current_stream(rows.device).record_event()
            self._sent.append(_Look(first, sizes, sent, arrived))
        else:
            self._sent.append(_Look(first, sizes, rows, None))

    def _look(self) -> None:
        look = self._sent.popleft()
        if look.arrived is not None:
            look.arrived.synchronize()
        bad = (~look.rows.isfinite()).nonzero()
        if len(bad):
            at = int(bad[0])
            ends = torch.tensor(look.sizes).cumsum(0)
            step = int((ends <= at).sum())
            row = at - int(ends[step]) + look.sizes[step]
            value, sample = look.rows[at].item(), self._looked_at + at
            raise self.error(value, look.first + step, row, sample)
        self._sum += float(look.rows.sum())
        self._looked_at += len(look.rows)
