"""Metrics over a pass: each adds up what batches show and gives numbers at the end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pcx.extras import need


class Metrics:
    """Adds up what an objective observed of each batch; a subclass says how."""

    def update(self, *observed: Tensor) -> None:
        """Adds one batch; a GPU is not waited for."""
        raise NotImplementedError

    def compute(self) -> dict[str, float]:
        """The numbers by name, the most telling one first; {} before any sample."""
        raise NotImplementedError


class Accuracy(Metrics):
    """The share of rows that are true, in percent."""

    def __init__(self) -> None:
        self.right: Any = 0
        self.samples = 0

    def update(self, *observed: Tensor) -> None:
        """Adds hits [B], boolean."""
        (hits,) = observed
        self.right = self.right + hits.sum()
        self.samples += len(hits)

    def compute(self) -> dict[str, float]:
        """{"accuracy": percent}."""
        return {"accuracy": 100 * int(self.right) / self.samples} if self.samples else {}


class TopAccuracy(Accuracy):
    """The accuracy, and the share of rows whose label is among the k highest, in percent.

    Args:
        top: k.
    """

    def __init__(self, top: int) -> None:
        super().__init__()
        self.top = top
        self.near: Any = 0

    def update(self, *observed: Tensor) -> None:
        """Adds hits [B] and hits of the k highest [B], boolean."""
        hits, near = observed
        super().update(hits)
        self.near = self.near + near.sum()

    def compute(self) -> dict[str, float]:
        """{"accuracy": percent, "accuracy_top<k>": percent}."""
        found = super().compute()
        if found:
            found[f"accuracy_top{self.top}"] = 100 * int(self.near) / self.samples
        return found


class AveragePrecision(Metrics):
    """The mean over classes of the average precision (mAP), in percent."""

    def __init__(self) -> None:
        self.scores: list[Tensor] = []
        self.targets: list[Tensor] = []

    def update(self, *observed: Tensor) -> None:
        """Adds logits [B, C] and targets [B, C] of 0 and 1."""
        scores, targets = observed
        self.scores.append(scores.detach().float())
        self.targets.append(targets.detach().long())

    def compute(self) -> dict[str, float]:
        """{"mean_average_precision": percent}; classes without a positive sample are left out."""
        need("torchmetrics", "the mean average precision of objective 'multi-label'")
        from torchmetrics.functional.classification import binary_average_precision

        if not self.scores:
            return {}
        scores, targets = torch.cat(self.scores).cpu(), torch.cat(self.targets).cpu()
        seen = targets.any(0)
        if not seen.any():
            return {"mean_average_precision": float("nan")}
        # As probabilities: torchmetrics would take logits in [0, 1] for these. Class by class: it
        # takes no mean over a single one.
        pairs = zip(scores[:, seen].sigmoid().T, targets[:, seen].T, strict=True)
        found = torch.stack([binary_average_precision(*pair) for pair in pairs]).mean()
        return {"mean_average_precision": 100 * float(found)}


class Errors(Metrics):
    """Mean absolute error, and the share of the targets' variance that is explained (R2)."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []
        self.targets: list[Tensor] = []

    def update(self, *observed: Tensor) -> None:
        """Adds outputs [B, K] and targets [B, K]."""
        found, targets = observed
        self.found.append(found.detach().double())
        self.targets.append(targets.detach().double())

    def compute(self) -> dict[str, float]:
        """{"mean_absolute_error": in the targets' unit, "r2": 1 at best, mean over outputs}."""
        if not self.found:
            return {}
        found, targets = torch.cat(self.found).cpu(), torch.cat(self.targets).cpu()
        left = (found - targets).square().sum(0)
        whole = (targets - targets.mean(0)).square().sum(0)
        r2 = torch.where(whole > 0, 1 - left / whole, torch.nan)
        error = (found - targets).abs().mean()
        return {"mean_absolute_error": float(error), "r2": float(r2.mean())}


class IntersectionOverUnion(Metrics):
    """The mean over classes of intersection over union (mIoU), in percent."""

    def __init__(self) -> None:
        self.confusion: Any = 0  # [C, C], rows by target

    def update(self, *observed: Tensor) -> None:
        """Adds confusion matrices [B, C, C] of pixels, rows by target."""
        (confusion,) = observed
        self.confusion = self.confusion + confusion.sum(0)

    def compute(self) -> dict[str, float]:
        """{"mean_iou": percent}; classes that neither targets nor outputs have are left out."""
        if not isinstance(self.confusion, Tensor):
            return {}
        counts = self.confusion.double().cpu()
        union = counts.sum(0) + counts.sum(1) - counts.diagonal()
        share = counts.diagonal()[union > 0] / union[union > 0]
        return {"mean_iou": 100 * float(share.mean())}
