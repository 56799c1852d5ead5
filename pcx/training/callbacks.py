"""What a training calls while it goes: a small protocol, and early stopping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from pcx.arguments import whole_number

LOWER = ("loss", "error")  # ends of the names of measures of which less is better
NO_MEASURES = ("epoch", "samples", "lr", "loader_share", "seconds")  # columns that say how it went
FUNCTIONS = ("on_start", "on_step", "on_epoch", "on_end", "on_exit")


class Callback:
    """Called by `pcx.fit` while it goes; a subclass overrides what it needs.

    With several processes it is called in each of them. Losses and metrics are the same in all, but
    seconds and loader_share are each process's own; the first process decides whether to end.
    """

    def on_start(self, config: Mapping[str, Any], history: Sequence[dict[str, Any]]) -> None:
        """Called once before the first epoch.

        Args:
            config: what a run folder's config.json holds: the "recipe", and facts of the run.
            history: the rows of the run that this one continues; empty for a new run.
        """

    def on_step(self, epoch: int, step: int, losses: Tensor) -> None:
        """Called behind each batch.

        Args:
            epoch, step: of the batch, each counted from 1.
            losses: of each sample, [B], on the device; reading them waits for a GPU.
        """

    def on_epoch(self, history: Sequence[dict[str, Any]]) -> bool | None:
        """Called behind each epoch, once its checkpoint is written.

        The model has the weights that were validated: with `ema` their moving average.

        Args:
            history: a row for each epoch so far, also for those before a resumed run.

        Returns:
            True to end the training here.
        """
        return None

    def on_end(self, history: Sequence[dict[str, Any]]) -> None:
        """Called once at the end of a training that was not interrupted."""

    def on_exit(self) -> None:
        """Called last, also behind an error or an interruption; what is open is closed here."""


class EarlyStopping(Callback):
    """Ends a training whose measure has not improved for some epochs.

    What it decides follows from the history alone, so that a resumed training ends where an
    undisturbed one does.

    Args:
        metric: a column of the history, such as "val_accuracy" or "val_loss". Less is better of
            names that end with "loss" or "error", more of all others.
        patience: epochs without an improvement after which the training ends.

    Raises:
        ValueError: the patience is no positive whole number, or the metric no column to go by.
    """

    def __init__(self, metric: str = "val_accuracy", patience: int = 10):
        self.metric = checked_metric("metric", metric)
        self.patience = whole_number("patience", patience, 1)

    def on_epoch(self, history: Sequence[dict[str, Any]]) -> bool | None:
        """True once the best epoch is as long ago as the patience."""
        values = [measure(row, self.metric) for row in history]
        return len(values) - 1 - values.index(max(values)) >= self.patience


def checked_metric(name: str, metric: Any) -> str:
    """The metric, a column of the history that may tell good epochs from bad ones.

    Args:
        name: of the argument.
        metric: what was given.

    Raises:
        ValueError: it is no text, or a column such as "seconds".
    """
    if not isinstance(metric, str) or metric in NO_MEASURES:
        raise ValueError(
            f"{name}: {metric!r}, expected a column of the history that says how good a model is, "
            "such as 'val_accuracy' or 'loss'"
        )
    return metric


def measure(row: dict[str, Any], metric: str, name: str = "metric") -> float:
    """The measure of an epoch, of which more is better; a NaN is worse than anything.

    Raises:
        ValueError: the history has no such column; the message lists those that it has.
    """
    if metric not in row or not isinstance(row[metric], int | float):
        hint = "; give fit a val_loader" if metric.startswith("val_") else ""
        there = sorted(set(row) - set(NO_MEASURES))
        raise ValueError(f"{name}: {metric!r} is none of the history's {there}{hint}")
    value = -row[metric] if metric.endswith(LOWER) else row[metric]
    return float("-inf") if math.isnan(value) else value


def check_callbacks(callbacks: Any) -> list[Callback]:
    """The callbacks as a list.

    Raises:
        ValueError: one of them lacks a function of `Callback`.
    """
    if isinstance(callbacks, type) or not isinstance(callbacks, Iterable):
        callbacks = [callbacks]
    given = list(callbacks)
    for i, each in enumerate(given):
        if isinstance(each, type) or not all(callable(getattr(each, f, None)) for f in FUNCTIONS):
            raise ValueError(
                f"callbacks[{i}]: a {type(each).__name__}, expected a subclass of "
                "pcx.training.callbacks.Callback"
            )
    return given
