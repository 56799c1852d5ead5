"""Losses of samples, and what their labels may be."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Criterion = Callable[[Tensor, Tensor], Tensor]


def per_sample_loss(
    logits: Tensor, labels: Tensor, criterion: Criterion | None = None, *, check: bool = True
) -> Tensor:
    """The loss of each sample, [B] float32 or wider; cross-entropy by default.

    Labels are [B], integers; `check` looks at their values, for which a GPU has to be waited for.
    """
    if labels.dim() != 1 or labels.is_floating_point() or len(labels) != len(logits):
        raise ValueError(
            f"loader: labels of shape {tuple(labels.shape)} and {labels.dtype}, expected one class "
            f"per image, integers [{len(logits)}]"
        )
    labels = labels.long()
    if criterion is None:
        if check:
            check_labels(label_range(labels), logits.shape[-1])
        return F.cross_entropy(_at_least_float32(logits), labels, reduction="none")
    losses = criterion(_at_least_float32(logits), labels)
    if losses.shape != labels.shape[:1]:
        raise ValueError(
            f"criterion: gave shape {tuple(losses.shape)}, expected one loss per sample "
            f"[{labels.shape[0]}]; use reduction='none'"
        )
    return losses


def criterion_name(criterion: Criterion | None) -> str:
    """What tells criteria apart in a file."""
    if criterion is None:
        return "cross-entropy"
    return getattr(criterion, "__qualname__", None) or repr(criterion)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def label_range(labels: Tensor) -> tuple[int, int]:
    """The lowest and the highest, (0, 0) of none; a GPU that has them is waited for."""
    return (int(labels.min()), int(labels.max())) if labels.numel() else (0, 0)


def check_labels(seen: tuple[int, int], classes: int) -> None:
    low, high = seen
    if low < 0 or high >= classes:
        raise ValueError(
            f"loader: labels {low}..{high} for a head of {classes} classes; "
            "give VPT num_classes, or map the labels to 0..C-1"
        )
