"""Trackers of experiments, such as TensorBoard's, through Accelerate."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate.state import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType
from torch import Tensor

from pcx.arguments import whole_number
from pcx.training.callbacks import Callback

STEP_LOSS = "step_loss"  # the name of the mean loss of a batch


class Tracker(Callback):
    """Hands a training to trackers of Accelerate, such as TensorBoard, Weights & Biases, MLflow.

    They get the recipe as the run's configuration, the row of each epoch under the names of its
    columns, and the mean loss of every n-th batch as "step_loss". The step counts batches from the
    first epoch on; with `accumulate` an epoch has as many as fill its updates. Of several processes
    the main one alone writes.

    Args:
        names: one or several of Accelerate's names ("tensorboard", "wandb", "mlflow", ...), or
            trackers of your own, `accelerate.tracking.GeneralTracker`.
        project: what the trackers call the project.
        folder: where trackers that write files do so, in a folder of the project's name.
        every: batches from one loss to the next; reading one waits for a GPU.

    Raises:
        ValueError: there is no such tracker, its package is not installed, or it needs a folder.

    Example:
        >>> pcx.fit(model, loader, epochs=10, lr=0.1, callbacks=Tracker("wandb", project="cars"))
    """

    def __init__(
        self,
        names: str | GeneralTracker | Sequence[str | GeneralTracker],
        *,
        project: str = "pcx",
        folder: str | os.PathLike | None = None,
        every: int = 10,
    ):
        given = [names] if isinstance(names, str | GeneralTracker) else names
        self.names = list(dict.fromkeys(_checked(name, folder) for name in given))
        if not self.names:
            raise ValueError(f"names: got none, expected one or several of {_known()}")
        self.project = project
        self.folder = folder
        self.every = whole_number("every", every, 1)
        self._started: list[GeneralTracker] = []
        self._batches = 0  # of an epoch
        self._before = 0  # epochs of the run that this one continues

    def on_start(self, config: Mapping[str, Any], history: Sequence[dict[str, Any]]) -> None:
        """Starts the trackers, and hands them the recipe."""
        recipe = config["recipe"]
        self._batches = recipe["updates_per_epoch"] * recipe["accumulate"]
        self._before = len(history)
        if not PartialState().is_main_process:
            return
        facts = {k: v for k, v in config.items() if isinstance(v, str | int | float)}
        for name in self.names:
            tracker = self._new(name)
            if hasattr(tracker, "start"):  # of an older Accelerate they start where they are made
                tracker.start()
            self._started.append(tracker)
            tracker.store_init_configuration({**recipe, **facts})

    def on_step(self, epoch: int, step: int, losses: Tensor) -> None:
        """Hands over the mean loss of every n-th batch."""
        at = (epoch - 1) * self._batches + step
        if self._started and at % self.every == 0:
            self._log({STEP_LOSS: float(losses.mean())}, at)

    def on_epoch(self, history: Sequence[dict[str, Any]]) -> bool | None:
        """Hands over the row of an epoch that this run has made."""
        if len(history) > self._before:
            row = {k: v for k, v in history[-1].items() if isinstance(v, int | float)}
            self._log(row, len(history) * self._batches)
        return None

    def on_exit(self) -> None:
        """Finishes the trackers, also behind an error."""
        while self._started:
            self._started.pop().finish()

    def _log(self, values: dict[str, Any], step: int) -> None:
        for tracker in self._started:
            tracker.log(values, step=step)

    def _new(self, name: str | GeneralTracker) -> GeneralTracker:
        if isinstance(name, GeneralTracker):
            return name
        options: dict[str, Any] = {}
        if name == "tensorboard":
            # Hides what an interrupted or replaced run has written of the steps that come now.
            options["purge_step"] = self._before * self._batches + 1 if self._before else 0
        kind = LOGGER_TYPE_TO_CLASS[name]
        place = [self.folder] if kind.requires_logging_directory else []
        return kind(self.project, *place, **options)


def _checked(name: Any, folder: Any) -> str | GeneralTracker:
    if isinstance(name, GeneralTracker):
        return name
    if not isinstance(name, str) or name not in LOGGER_TYPE_TO_CLASS:
        raise ValueError(f"names: got {name!r}, expected one or several of {_known()}")
    # A class that a user has registered is there, and none of LoggerType.
    if name in LoggerType.list() and name not in map(str, get_available_trackers()):
        raise ValueError(
            f"names: {name!r} needs a package that is not installed; run: pip install {name}"
        )
    if LOGGER_TYPE_TO_CLASS[name].requires_logging_directory and folder is None:
        raise ValueError(f"folder: {name!r} writes files; give the folder for them")
    return name


def _known() -> str:
    return ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
