"""Accuracy and loss over a loader."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn

Criterion = Callable[[Tensor, Tensor], Tensor]


def new_accelerator(amp: str = "no", seed: int = 0) -> Accelerator:
    """An Accelerator for this call alone: two calls in one process may differ in precision.

    Loaders that shuffle do so by seed and epoch, on every process alike.
    """
    if amp not in ("no", "bf16", "fp16"):
        raise ValueError(f"amp: got {amp!r}, expected 'no', 'bf16' or 'fp16'")
    AcceleratorState._reset_state(reset_partial_state=False)
    loading = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed)
    return Accelerator(mixed_precision=amp, dataloader_config=loading)


def gathered(accelerator: Accelerator, *tensors: Tensor) -> tuple[Tensor, ...]:
    """One row per sample from all processes, without the samples that padded the last batch."""
    if accelerator.num_processes == 1:  # nothing to drop, whatever the sampler's length
        return tensors
    return accelerator.gather_for_metrics(tensors)


def evaluate(
    model: nn.Module, loader, *, criterion: Criterion | None = None, amp: str = "no"
) -> dict:
    """Accuracy and mean loss; each sample counts once, also where processes share the loader.

    Args:
        model: maps images to logits [B, C]; moved to the accelerator's device and put in eval mode
            for the length of the call.
        loader: yields (images, labels).
        criterion: (logits, labels) -> one loss per sample [B]; cross-entropy by default.
        amp: "no", "bf16" or "fp16".

    Returns:
        {"accuracy": percent, "loss": mean, "samples": count}.

    Raises:
        ValueError: the loader is empty, or the criterion does not give one value per sample.
    """
    accelerator = new_accelerator(amp)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    return evaluate_prepared(accelerator, model, accelerator.prepare(loader), criterion)


@torch.no_grad()
def evaluate_prepared(
    accelerator: Accelerator, model: nn.Module, loader, criterion: Criterion | None = None
) -> dict:
    """`evaluate` on what an Accelerator has prepared already."""
    was_training = model.training
    model.eval()
    loss, correct, samples = 0.0, 0, 0
    for images, labels in loader:
        logits = model(images)
        losses = per_sample_loss(logits, labels, criterion)
        losses, hits = gathered(accelerator, losses, logits.argmax(-1) == labels)
        loss += float(losses.double().sum())
        correct += int(hits.sum())
        samples += len(losses)
    model.train(was_training)
    if not samples:
        raise ValueError("loader: it yielded no sample")
    return {"accuracy": 100 * correct / samples, "loss": loss / samples, "samples": samples}


def per_sample_loss(
    logits: Tensor, labels: Tensor, criterion: Criterion | None = None, *, check: bool = True
) -> Tensor:
    """The loss of each sample, [B] float32 or wider; cross-entropy by default.

    `check` looks at the labels' values, for which a GPU has to be waited for.
    """
    if criterion is None:
        if check:
            _check_labels(logits, labels)
        return F.cross_entropy(_at_least_float32(logits), labels, reduction="none")
    losses = criterion(_at_least_float32(logits), labels)
    if losses.shape != labels.shape[:1]:
        raise ValueError(
            f"criterion: gave shape {tuple(losses.shape)}, expected one loss per sample "
            f"[{labels.shape[0]}]; use reduction='none'"
        )
    return losses


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _check_labels(logits: Tensor, labels: Tensor) -> None:
    if labels.dtype == torch.int64 and labels.numel():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= logits.shape[-1]:
            raise ValueError(
                f"loader: labels {low}..{high} for a head of {logits.shape[-1]} classes; "
                "give VPT num_classes, or map the labels to 0..C-1"
            )
