"""Accuracy and loss over a loader."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DataLoaderConfiguration, parse_flag_from_env
from torch import Tensor, nn

from pcx.backbones.outputs import logits_of
from pcx.training.batches import images_and_labels
from pcx.training.execution import prepared
from pcx.training.objectives import Criterion, Objective, objective_for


@contextmanager
def accelerator_for(amp: str = "no", seed: int = 0) -> Iterator[Accelerator]:
    """Gives an Accelerator for one call, and puts the caller's own back afterwards."""
    if amp not in ("no", "bf16", "fp16"):
        raise ValueError(f"amp: got {amp!r}, expected 'no', 'bf16' or 'fp16'")
    before = dict(AcceleratorState._shared_state)
    AcceleratorState._reset_state(reset_partial_state=False)
    # Processes must shuffle alike; one alone shuffles by the loader's or torch's own generator.
    processes = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).num_processes
    loading = DataLoaderConfiguration(use_seedable_sampler=processes > 1, data_seed=seed)
    try:
        yield Accelerator(mixed_precision=amp, dataloader_config=loading)
    finally:
        AcceleratorState._shared_state.clear()
        AcceleratorState._shared_state.update(before)


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
) -> dict:
    """Metrics and mean loss; each sample counts once, also where processes share the loader.

    Args:
        model: maps images to logits [B, C], or to an output with logits; moved to the accelerator's
            device and put in eval mode for the length of the call.
        loader: yields (images, labels), or dicts of "pixel_values" and "labels".
        criterion: (logits, labels) -> one loss per sample [B]; the objective's own by default.
        objective: a name in `pcx.training.OBJECTIVES`, or an `Objective`: what labels look like.
        amp: "no", "bf16" or "fp16".

    Returns:
        {"accuracy": percent, "loss": mean, "samples": count}, with the objective's metrics in place
        of the accuracy.

    Raises:
        ValueError: the loader is empty, or the criterion does not give one value per sample.
    """
    with accelerator_for(amp) as accelerator:
        model.to(accelerator.device)
        chosen = objective_for(objective, criterion)
        return evaluate_on(accelerator, model, accelerator.prepare(loader), chosen)


@torch.no_grad()
def evaluate_on(accelerator: Accelerator, model: nn.Module, loader, objective: Objective) -> dict:
    """`evaluate` with a model on the accelerator's device and a loader it has prepared."""
    modes = [(module, module.training) for module in model.modules()]
    metrics, loss, samples = objective.metrics(), 0.0, 0
    run = prepared(lambda: lambda images: logits_of(model(images)), accelerator.device)
    model.eval()
    try:
        for batch in loader:
            images, labels = images_and_labels(batch)
            with accelerator.autocast():
                logits = run(images)
            losses = objective.losses(logits, labels)
            losses, *seen = gathered(accelerator, losses, *objective.observed(logits, labels))
            loss += float(losses.double().sum())
            metrics.update(*seen)
            samples += len(losses)
    finally:
        for module, training in modes:
            module.training = training
    if not samples:
        raise ValueError("loader: it yielded no sample")
    return {**metrics.compute(), "loss": loss / samples, "samples": samples}


def standard_error(found: dict) -> float:
    """The standard error of an accuracy, in percent: that of a binomial proportion."""
    share = found["accuracy"] / 100
    return 100 * math.sqrt(share * (1 - share) / found["samples"])
