"""Objectives: the loss of each sample, what targets may look like, and the metrics.

`pcx.training.OBJECTIVES` names them. fit, evaluate and score take the objective in place of knowing
that a target is one class per image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pcx.arguments import whole_number
from pcx.backbones.outputs import IGNORED
from pcx.models.base import TunedModel
from pcx.training import OBJECTIVES
from pcx.training.class_weights import ClassWeights
from pcx.training.metrics import (
    Accuracy,
    AveragePrecision,
    Errors,
    IntersectionOverUnion,
    Metrics,
    TopAccuracy,
)

Criterion = Callable[[Tensor, Tensor], Tensor]


class Objective:
    """The loss of each sample and the metrics of a pass; a subclass says which.

    Args:
        criterion: (logits, targets) -> one loss per sample [B], in place of the objective's own.

    Attributes:
        name: in `OBJECTIVES`.
        loss_name: of the objective's own loss, by which files tell runs apart.
        targets: what targets look like, for error messages.
        metric: the most telling number of its metrics.
    """

    name: ClassVar[str]
    loss_name: ClassVar[str]
    targets: ClassVar[str]
    metric: ClassVar[str] = "accuracy"

    def __init__(self, criterion: Criterion | None = None):
        self.criterion = criterion

    def losses(self, logits: Tensor, targets: Tensor, *, check: bool = True) -> Tensor:
        """The loss of each sample, [B] float32 or wider.

        Args:
            logits: what the model gave, [B, ...].
            targets: what the loader gave.
            check: whether the targets' values are looked at, for which a GPU has to be waited for.

        Raises:
            ValueError: targets do not fit, or the criterion does not give one value per sample.
        """
        if not self.fits(logits, targets):
            raise ValueError(
                f"loader: labels of shape {tuple(targets.shape)} and {targets.dtype} for logits "
                f"{tuple(logits.shape)}, expected {self.targets} (objective {self.name!r})"
                f"{_others_that_fit(logits, targets)}"
            )
        wide = logits if logits.dtype == torch.float64 else logits.float()
        if self.criterion is None:
            if check:
                self.check_seen(self.look_at(targets), logits.shape)
            return self.own_losses(wide, targets)
        losses = self.criterion(wide, self.given_to_criterion(targets))
        if losses.shape != targets.shape[:1]:
            raise ValueError(
                f"criterion: gave shape {tuple(losses.shape)}, expected one loss per sample "
                f"[{targets.shape[0]}]; use reduction='none'"
            )
        return losses

    @property
    def described(self) -> str:
        """What tells objectives and criteria apart in a file."""
        if self.criterion is None:
            return self.loss_name
        return getattr(self.criterion, "__qualname__", None) or repr(self.criterion)

    def fits(self, logits: Tensor, targets: Tensor) -> bool:
        """Whether targets have the shape and type that the objective takes."""
        raise NotImplementedError

    def own_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The objective's own loss [B]; targets are checked, logits are float32 or wider."""
        raise NotImplementedError

    def given_to_criterion(self, targets: Tensor) -> Tensor:
        """The targets as a criterion takes them."""
        return targets

    def look_at(self, targets: Tensor) -> Any:
        """Reads from the targets' values what `check_seen` needs, before they go to a GPU."""
        return None

    def check_seen(self, seen: Any, shape: torch.Size) -> None:
        """Raises a ValueError where the values that were seen do not fit logits of a shape."""

    def observed(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """What the metrics need of a batch: tensors with a row per sample, without gradients."""
        raise NotImplementedError

    def metrics(self) -> Metrics:
        """New metrics for one pass."""
        raise NotImplementedError


class SingleLabel(Objective):
    """One class per image: cross-entropy, and the accuracy in percent.

    With class weights w the loss of a sample is w[y] * cross-entropy. The mean is over samples, as
    of every objective: it is divided by their number, not by the sum of their weights as in
    `torch.nn.CrossEntropyLoss(weight=w)`. Validation losses are weighted too.

    Args:
        criterion: as that of `Objective`.
        class_weights: a number for each class, 0 or more; None weighs all alike.
        top: k of a further metric "accuracy_top<k>": whether the label is among the k highest.

    Raises:
        ValueError: a weight is negative or not finite, all are 0, top is no whole number of 2 or
            more, or both a criterion and weights are given.
    """

    name = "single-label"
    loss_name = "cross-entropy"
    targets = "one class per image, integers [B]"

    def __init__(
        self,
        criterion: Criterion | None = None,
        *,
        class_weights: Sequence[float] | Tensor | None = None,
        top: int | None = None,
    ):
        super().__init__(criterion)
        if criterion is not None and class_weights is not None:
            raise ValueError("class_weights: the criterion has its own; give one of the two")
        self.class_weights = None if class_weights is None else ClassWeights(class_weights)
        self.top = None if top is None else whole_number("top", top, 2)

    @property
    def described(self) -> str:
        """The criterion or the loss, with the weights."""
        weighed = "" if self.class_weights is None else f", {self.class_weights}"
        return super().described + weighed

    def fits(self, logits: Tensor, targets: Tensor) -> bool:
        """Integers [B]."""
        whole = not targets.is_floating_point()
        return targets.dim() == 1 and whole and len(targets) == len(logits)

    def given_to_criterion(self, targets: Tensor) -> Tensor:
        """As int64."""
        return targets.long()

    def own_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy times the weight of the label, [B]."""
        weight = None if self.class_weights is None else self.class_weights.beside(logits)
        return F.cross_entropy(logits, targets.long(), weight=weight, reduction="none")

    def look_at(self, targets: Tensor) -> tuple[int, int] | None:
        """The lowest and the highest label, (0, 0) of none."""
        if targets.dim() != 1 or targets.is_floating_point():
            return None
        return (int(targets.min()), int(targets.max())) if targets.numel() else (0, 0)

    def check_seen(self, seen: tuple[int, int] | None, shape: torch.Size) -> None:
        """Raises a ValueError where a label is none of the head's classes."""
        low, high = seen or (0, 0)
        if len(shape) != 2:
            raise ValueError(
                f"model: it gives {tuple(shape)}, expected logits [B, C]; give the model a head, "
                "or use another objective, such as objective='segmentation' of a class per pixel"
            )
        classes = shape[-1]
        if low < 0 or high >= classes:
            raise ValueError(
                f"loader: labels {low}..{high} for a head of {classes} classes; "
                "give VPT num_classes, or map the labels to 0..C-1"
            )

    def observed(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Whether the highest logit is the label's, [B]; one logit is above 0 for class 1.

        With `top`, also whether the label's is among the k highest, [B].
        """
        found, classes = logits.detach(), logits.shape[-1]
        if self.top is not None and self.top >= classes:
            raise ValueError(f"top: {self.top}, expected less than the head's {classes} classes")
        if classes == 1:
            return ((found[:, 0] > 0) == targets,)
        hits = found.argmax(-1) == targets
        if self.top is None:
            return (hits,)
        return hits, (found.topk(self.top).indices == targets[:, None]).any(-1)

    def metrics(self) -> Metrics:
        """The accuracy, and that of the k highest."""
        return Accuracy() if self.top is None else TopAccuracy(self.top)


class MultiLabel(Objective):
    """Any number of classes per image: binary cross-entropy, and mAP in percent."""

    name = "multi-label"
    loss_name = "binary cross-entropy"
    targets = "0 or 1 for each class, [B, C]"
    metric = "mean_average_precision"

    def fits(self, logits: Tensor, targets: Tensor) -> bool:
        """[B, C] as the logits."""
        return targets.shape == logits.shape and targets.dim() == 2

    def own_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Binary cross-entropy, mean over classes, [B]."""
        wanted = targets.to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1)

    def look_at(self, targets: Tensor) -> tuple[float, float]:
        """The lowest and the highest target, (0, 0) of none."""
        values = targets.float()
        return (float(values.min()), float(values.max())) if values.numel() else (0.0, 0.0)

    def check_seen(self, seen: tuple[float, float], shape: torch.Size) -> None:
        """Raises a ValueError where a target lies outside of 0 to 1."""
        low, high = seen
        if not (low >= 0 and high <= 1):
            raise ValueError(f"loader: labels {low:g}..{high:g}, expected 0 or 1 for each class")

    def observed(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Logits [B, C], and targets [B, C]."""
        return logits.detach(), targets > 0.5

    def metrics(self) -> Metrics:
        """The mean average precision."""
        return AveragePrecision()


class SoftTargets(Objective):
    """A distribution over classes per image, as mixup and teachers give it."""

    name = "soft"
    loss_name = "cross-entropy of soft targets"
    targets = "a probability for each class, floating point [B, C]"
    TOLERANCE: ClassVar[float] = 0.01  # of the sum of a sample's probabilities, for 16-bit targets

    def fits(self, logits: Tensor, targets: Tensor) -> bool:
        """Floating point [B, C] as the logits."""
        return targets.shape == logits.shape and targets.is_floating_point()

    def own_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy, [B]."""
        return F.cross_entropy(logits, targets.to(logits.dtype), reduction="none")

    def look_at(self, targets: Tensor) -> tuple[float, float, float]:
        """The lowest probability, and the lowest and the highest sum of a sample's."""
        if targets.dim() != 2 or not targets.numel():
            return 0.0, 1.0, 1.0
        sums = targets.double().sum(1)
        return float(targets.min()), float(sums.min()), float(sums.max())

    def check_seen(self, seen: tuple[float, float, float], shape: torch.Size) -> None:
        """Raises a ValueError where a sample's targets are no probabilities."""
        low, least, most = seen
        if not (low >= 0 and least >= 1 - self.TOLERANCE and most <= 1 + self.TOLERANCE):
            raise ValueError(
                f"loader: soft labels from {low:g} on that sum to {least:g}..{most:g} an image, "
                "expected 0 or more that sum to 1; divide each row by its sum, or use "
                "objective='multi-label' for independent classes"
            )

    def observed(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Whether the highest logit is the likeliest class's, [B]."""
        return (logits.detach().argmax(-1) == targets.argmax(-1),)

    def metrics(self) -> Metrics:
        """The accuracy against the likeliest class."""
        return Accuracy()


class Regression(Objective):
    """Numbers per image: the mean squared error, the mean absolute error, and R2."""

    name = "regression"
    loss_name = "squared error"
    targets = "numbers [B] or [B, K] for K outputs"
    metric = "mean_absolute_error"

    def fits(self, logits: Tensor, targets: Tensor) -> bool:
        """[B, K] as the outputs, or [B] for one output."""
        return targets.reshape(len(targets), -1).shape == logits.shape and targets.dim() <= 2

    def own_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The squared error, mean over outputs, [B]."""
        return (logits - self._rows(targets, logits)).square().mean(1)

    def observed(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Outputs [B, K], and targets [B, K]."""
        return logits.detach(), self._rows(targets, logits)

    def metrics(self) -> Metrics:
        """The mean absolute error, and R2."""
        return Errors()

    def _rows(self, targets: Tensor, logits: Tensor) -> Tensor:
        return targets.reshape(logits.shape).to(logits.dtype)


class Segmentation(Objective):
    """A class per pixel: cross-entropy, mean over a sample's pixels, and mIoU in percent.

    Pixels of label 255 count nowhere.
    """

    name = "segmentation"
    loss_name = "cross-entropy of pixels"
    targets = "a class per pixel, integers [B, H, W] for logits [B, C, H, W]"
    metric = "mean_iou"
    IGNORED: ClassVar[int] = IGNORED

    def fits(self, logits: Tensor, targets: Tensor) -> bool:
        """Integers [B, H, W]."""
        if logits.dim() != 4 or targets.is_floating_point():
            return False
        return targets.shape == (logits.shape[0], *logits.shape[2:])

    def own_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy, mean over the pixels that count, [B]."""
        wanted = targets.long()
        losses = F.cross_entropy(logits, wanted, reduction="none", ignore_index=self.IGNORED)
        return losses.flatten(1).sum(1) / (wanted != self.IGNORED).flatten(1).sum(1).clamp(min=1)

    def look_at(self, targets: Tensor) -> tuple[int, int]:
        """The lowest and the highest class of the pixels that count, (0, 0) of none."""
        counted = targets.long()
        counted = counted[counted != self.IGNORED]
        return (int(counted.min()), int(counted.max())) if counted.numel() else (0, 0)

    def check_seen(self, seen: tuple[int, int], shape: torch.Size) -> None:
        """Raises a ValueError where a pixel's class is none of the head's."""
        low, high = seen
        if low < 0 or high >= shape[1]:
            raise ValueError(
                f"loader: pixels of classes {low}..{high} for a head of {shape[1]} classes, "
                f"expected 0..{shape[1] - 1}, or {self.IGNORED} for pixels that do not count"
            )

    def observed(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Confusion matrices of pixels [B, C, C], rows by target."""
        classes, wanted = logits.shape[1], targets.long().flatten(1)
        counts = wanted != self.IGNORED
        cells = wanted.where(counts, 0) * classes + logits.detach().argmax(1).flatten(1)
        found = logits.new_zeros(len(logits), classes**2, dtype=torch.int64)
        return (found.scatter_add(1, cells, counts.long()).unflatten(1, (classes, classes)),)

    def metrics(self) -> Metrics:
        """The mean intersection over union."""
        return IntersectionOverUnion()


def _others_that_fit(logits: Tensor, targets: Tensor) -> str:
    """A hint at the objectives that take such targets."""
    names = [name for name in OBJECTIVES if OBJECTIVES[name]().fits(logits, targets)]
    return f"; objective={' or '.join(map(repr, names))} takes them" if names else ""


def objective_for(
    objective: str | Objective | None, criterion: Criterion | None = None
) -> Objective:
    """The objective of that name with a criterion, "single-label" for None.

    Raises:
        ValueError: there is no such objective, or both an `Objective` and a criterion are given.
    """
    if isinstance(objective, Objective):
        if criterion is not None:
            raise ValueError("criterion: the objective has its own; give one of the two")
        return objective
    return OBJECTIVES.get_checked(objective or SingleLabel.name)(criterion)


def objective_of(model: TunedModel) -> str:
    """The name of the objective that a model was trained with, "single-label" where not known."""
    recipe = model.record.recipe or {}
    by_loss = {OBJECTIVES[name].loss_name: name for name in OBJECTIVES}
    found = recipe.get("objective") or by_loss.get(recipe.get("criterion"))  # of older files
    return found or SingleLabel.name
