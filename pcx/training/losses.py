"""Losses of a pass: their sum, and where one is no longer finite."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

LOOK_EVERY = 10  # steps between looks at the losses


class NonFiniteLoss(FloatingPointError):
    """The loss became NaN or infinite."""


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

    def error(self, value: float, step: int, sample: int) -> Exception:
        """The error for a loss that is not finite, by its step and sample in this pass."""
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
            step = int((torch.tensor(look.sizes).cumsum(0) <= at).sum())
            raise self.error(look.rows[at].item(), look.first + step, self._looked_at + at)
        self._sum += float(look.rows.sum())
        self._looked_at += len(look.rows)
