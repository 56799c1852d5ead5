"""What a training run depends on besides its data."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from timm.optim import list_optimizers
from timm.scheduler import create_scheduler_v2

from pcx.arguments import real_number, whole_number
from pcx.training.loaders import is_divided


@dataclass(frozen=True)
class Recipe:
    """The settings that a run depends on besides its data; a resumed run must have the same.

    Raises:
        ValueError: the warm-up is not shorter than the training.
    """

    epochs: int
    lr: float
    weight_decay: float
    momentum: float
    opt: str
    warmup_epochs: float
    clip_grad: float | None
    amp: str
    seed: int
    updates_per_epoch: int
    criterion: str
    frozen: str | None  # fingerprint of the frozen weights, of a run that writes checkpoints
    accumulate: int = 1  # batches whose gradients an update averages
    ema: float | None = None  # decay of the weights' moving average

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"warmup_epochs: {self.warmup_epochs}, expected 0 or more and under {self.epochs}"
            )


def rates_of(
    epochs: int,
    lr: float | None,
    base_lr: float | None,
    warmup_epochs: float | None,
    loader: Any,
    accelerator: Accelerator,
    accumulate: int = 1,
) -> dict[str, Any]:
    """A recipe's epochs, lr, warmup_epochs, updates_per_epoch and accumulate.

    Raises:
        ValueError: one of them does not fit, or the loader has no length.
    """
    epochs = whole_number("epochs", epochs, 1)
    accumulate = whole_number("accumulate", accumulate, 1)
    return {
        "epochs": epochs,
        "accumulate": accumulate,
        "lr": learning_rate_of(lr, base_lr, loader, accelerator, accumulate),
        "warmup_epochs": epochs / 10
        if warmup_epochs is None
        else real_number("warmup_epochs", warmup_epochs, least=0),
        "updates_per_epoch": math.ceil(batches_of(loader, accelerator) / accumulate),
    }


def learning_rate_of(lr, base_lr, loader, accelerator: Accelerator, accumulate: int = 1) -> float:
    """The learning rate itself, from lr or from base_lr times the images of an update / 256.

    Raises:
        ValueError: none or both are given, or the rate is not a positive number.
    """
    if (lr is None) == (base_lr is None):
        raise ValueError(f"lr: give lr or base_lr, one of them; got lr={lr}, base_lr={base_lr}")
    if lr is None:
        batch = getattr(loader, "batch_size", None)
        if batch is None:
            raise ValueError("base_lr: the loader has no batch_size to scale it by; give lr")
        rate = real_number("base_lr", base_lr, above=0, expected="a positive number")
        return rate * batch * accumulate * accelerator.num_processes / 256
    return real_number("lr", lr, above=0, expected="a positive number")


def checked_settings(
    opt: Any,
    weight_decay: Any,
    clip_grad: Any,
    seed: Any,
    momentum: Any = 0.9,
    ema: Any = None,
) -> dict[str, Any]:
    """The settings by name, as plain numbers.

    Raises:
        ValueError: one is out of range, or there is no such optimiser.
    """
    if opt not in list_optimizers():
        near = difflib.get_close_matches(str(opt), list_optimizers(), n=2)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"opt: {opt!r}, expected one of timm.optim.list_optimizers().{hint}")
    if clip_grad is not None:
        expected = "a positive number or None"
        clip_grad = real_number("clip_grad", clip_grad, above=0, expected=expected)
    return {
        "opt": opt,
        "weight_decay": real_number("weight_decay", weight_decay, least=0),
        "momentum": real_number("momentum", momentum, least=0, below=1),
        "clip_grad": clip_grad,
        "seed": whole_number("seed", seed),
        "ema": None if ema is None else real_number("ema", ema, above=0, below=1),
    }


def batches_of(loader, accelerator: Accelerator) -> int:
    """How many batches one process has in an epoch, by the length of the loader."""
    try:
        parts = 1 if is_divided(loader) else accelerator.num_processes
        return max(1, math.ceil(len(loader) / parts))
    except TypeError:
        raise ValueError("loader: it has no length, which the schedule needs") from None


def cosine_schedule(optimizer, recipe: Recipe):
    """timm's schedule: a linear warm-up, then cosine to zero, moved with every update."""
    warmup = recipe.warmup_epochs
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=recipe.epochs - warmup,  # type: ignore[arg-type]  # halves of an epoch do
        warmup_epochs=warmup,  # type: ignore[arg-type]
        warmup_prefix=True,
        warmup_lr=recipe.lr / max(1, warmup * recipe.updates_per_epoch),
        step_on_epochs=False,
        updates_per_epoch=recipe.updates_per_epoch,
    )
    return scheduler
