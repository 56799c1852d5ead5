"""Accuracy and loss over a loader."""

from __future__ import annotations

import atexit
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DataLoaderConfiguration, parse_flag_from_env
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pcx.models.base import check_module, keeping_modes
from pcx.tasks.batches import check_loader
from pcx.training.batches import BatchCheck, placed
from pcx.training.class_names import agreed_names
from pcx.training.execution import compiled, prepared
from pcx.training.loaders import is_divided
from pcx.training.losses import Losses, seen_losses
from pcx.training.objectives import Criterion, Objective, objective_for


@contextmanager
def accelerator_for(amp: str = "no", seed: int = 0) -> Iterator[Accelerator]:
    """Gives an Accelerator for one call, and puts the caller's own back afterwards."""
    if amp not in ("no", "bf16", "fp16"):
        raise ValueError(f"amp: got {amp!r}, expected 'no', 'bf16' or 'fp16'")
    with _ONE_AT_A_TIME, _own_state():
        yield _accelerator(amp, seed)


_ONE_AT_A_TIME = threading.RLock()  # Accelerate's state is one for all threads


@contextmanager
def _own_state() -> Iterator[None]:
    before = dict(AcceleratorState._shared_state)
    AcceleratorState._reset_state(reset_partial_state=False)
    try:
        yield
    finally:
        AcceleratorState._shared_state.clear()
        AcceleratorState._shared_state.update(before)


def _accelerator(amp: str, seed: int) -> Accelerator:
    # Processes must shuffle alike; one alone shuffles by the loader's or torch's own generator.
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    processes = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).num_processes
    if processes > 1 and not joined:
        # A process that ends within its group can be aborted: torch's threads still run.
        atexit.register(PartialState().destroy_process_group)
    loading = DataLoaderConfiguration(use_seedable_sampler=processes > 1, data_seed=seed)
    if amp == "fp16" and PartialState().device.type == "cpu":
        raise ValueError("amp: 'fp16' needs a GPU, and this runs on a CPU; use 'bf16' or 'no'")
    return Accelerator(mixed_precision=amp, dataloader_config=loading)


def gathered(accelerator: Accelerator, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Gathers one row per sample from all processes; padding of the last batch is dropped."""
    if accelerator.num_processes == 1:  # nothing to drop, whatever the sampler's length
        return tensors
    return accelerator.gather_for_metrics(tensors)


def evaluate(
    model: nn.Module,
    loader,
    *,
    criterion: Criterion | None = None,
    objective: str | Objective = "single-label",
    amp: str = "no",
    execution: str = "auto",
) -> dict:
    """Metrics and mean loss; each sample counts once, also where processes share the loader.

    Args:
        model: maps images to logits [B, C], or to an output with logits; moved to the accelerator's
            device and put in eval mode for the length of the call.
        loader: yields (images, labels), or dicts of "pixel_values" and "labels".
        criterion: (logits, labels) -> one loss per sample [B]; the objective's own by default.
        objective: a name in `pcx.training.OBJECTIVES`, or an `Objective`: what labels look like.
        amp: "no", "bf16" or "fp16".
        execution: as `pcx.fit` takes it.

    Returns:
        {"accuracy": percent, "loss": mean, "samples": count}, with the objective's metrics in place
        of the accuracy.

    Raises:
        ValueError: the loader is empty, its batches do not fit the model or the objective, its
            classes are not the model's, the criterion does not give one value per sample, or the
            execution is not possible.
        NonFiniteLoss: a loss is NaN or infinite; the message names an image that is.
    """
    check_module("model", model)
    check_loader(loader)
    with accelerator_for(amp) as accelerator:
        model.to(accelerator.device)
        chosen, names = objective_for(objective, criterion), agreed_names(model, loader)
        evaluation = Evaluation(accelerator, model, chosen, execution, names)
        try:
            return evaluation.of(divided(accelerator, loader))
        finally:
            evaluation.release()


def divided(accelerator: Accelerator, loader: Any) -> Any:
    """This process's share of a loader, whose batches stay where they are.

    A loader that is divided among processes already is read as it is.
    """
    if isinstance(loader, DataLoader) and not (
        accelerator.num_processes > 1 and is_divided(loader)
    ):
        return accelerator.prepare_data_loader(loader, device_placement=False)
    return loader


class Evaluation:
    """What evaluating a model on several passes has in common.

    Args:
        accelerator: of the call.
        model: on the accelerator's device.
        objective: of the labels.
        execution: as `pcx.fit` takes it.
        names: of the classes, for labels that are text.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        objective: Objective,
        execution: str,
        names: list[str] | None = None,
    ):
        self.accelerator, self.model, self.objective = accelerator, model, objective
        self.check = BatchCheck(objective, model, names)
        self._called = compiled(model, execution)
        self._run: Any = prepared(lambda: self._batch, accelerator.device, execution)

    @torch.no_grad()
    def of(self, loader: Any) -> dict:
        """The metrics, the mean loss and the samples of a loader that `divided` gave."""
        metrics, losses = self.objective.metrics(), Losses("the evaluation")
        with keeping_modes(self.model):
            self.model.eval()
            for images, labels in placed(loader, self.accelerator.device, self.check):
                found, *seen = gathered(self.accelerator, *self._run(images, labels))
                losses.add(found)
                metrics.update(*seen)
            loss = losses.mean()
        return {**metrics.compute(), "loss": loss, "samples": losses.samples}

    def release(self) -> None:
        """Gives back what a recording holds."""
        self._run = None

    def _batch(self, images: Any, labels: Tensor) -> tuple[Tensor, ...]:
        with self.accelerator.autocast():
            logits = self.check.logits(self._called, images)
        losses = self.check.losses(logits, labels)
        return seen_losses(losses, images), *self.objective.observed(logits, labels)


def standard_error(found: dict) -> float:
    """The standard error of an accuracy, in percent: that of a binomial proportion."""
    share = found["accuracy"] / 100
    return 100 * math.sqrt(share * (1 - share) / found["samples"])
