"""Weights that a training keeps beside those it trains: their average, and the best epoch's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pcx.models.base import copy_state
from pcx.training.callbacks import measure


class Average:
    """The exponential moving average of weights (EMA).

    Its decay in the nth update is (1 + n) / (10 + n) until that exceeds the one given, so that a
    short training does not keep its start.

    Args:
        weights: those that are trained, by name.
        decay: how much of the average stays in each update.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float):
        self.weights, self.decay = dict(weights), decay
        self.state = {name: tensor.detach().clone() for name, tensor in weights.items()}

    @torch.no_grad()
    def update(self, number: int) -> None:
        """Takes in the weights of now, behind that many updates."""
        decay = min(self.decay, (1 + number) / (10 + number))
        held, now = list(self.state.values()), [w.detach() for w in self.weights.values()]
        torch._foreach_lerp_(held, now, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the weights are their averages."""
        trained = {name: tensor.detach().clone() for name, tensor in self.weights.items()}
        copy_state(self.state, self.weights)
        try:
            yield
        finally:
            copy_state(trained, self.weights)


class Best:
    """The state of the epoch whose measure is the best so far; of equal ones the first.

    Args:
        metric: a column of the history, as `EarlyStopping` takes it.
    """

    def __init__(self, metric: str):
        self.metric = metric
        self.epoch = 0
        self.value = float("-inf")
        self.state: dict[str, Tensor] = {}

    def look_at(self, row: dict[str, Any], state: Mapping[str, Tensor]) -> None:
        """Keeps a copy of the state where the epoch is the best so far."""
        value = measure(row, self.metric, "best")
        if value > self.value or not self.epoch:
            self.epoch, self.value = row["epoch"], value
            self.state = {name: tensor.detach().clone() for name, tensor in state.items()}

    def as_state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        state = {name: tensor.cpu() for name, tensor in self.state.items()}
        return {"metric": self.metric, "epoch": self.epoch, "value": self.value, "state": state}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Goes on from what `as_state` gave."""
        self.epoch, self.value, self.state = saved["epoch"], saved["value"], dict(saved["state"])
