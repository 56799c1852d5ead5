"""Weights of classes: what they may be, those that balance a data set, and labels to count."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

LISTED = 20  # weights that a text lists; of more it has a digest


class ClassWeights:
    """A number for each class, by which the losses of its samples are multiplied.

    `str()` of it tells it from other weights: they are listed where they are few, else it has their
    digest.

    Args:
        class_weights: of each class, 0 or more.

    Raises:
        ValueError: they are no list of numbers, one is negative or not finite, or all are 0.
    """

    def __init__(self, class_weights: Any):
        self.values = _checked(class_weights)
        # Placed once for each device: a step that is recorded cannot copy from the CPU.
        self._placed: dict[Any, Tensor] = {}

    def beside(self, logits: Tensor) -> Tensor:
        """The weights [C] for logits [B, C], on their device.

        Raises:
            ValueError: there are more or fewer than classes.
        """
        if len(self.values) != logits.shape[-1]:
            raise ValueError(
                f"class_weights: {len(self.values)} weights for a head of {logits.shape[-1]} "
                "classes; give one for each class"
            )
        key = (logits.device, logits.dtype)
        if key not in self._placed:
            with torch.inference_mode(False):  # so that a later training can use them
                self._placed[key] = torch.tensor(
                    self.values, dtype=logits.dtype, device=logits.device
                )
        return self._placed[key]

    def __str__(self) -> str:
        listed = ", ".join(f"{weight:.9g}" for weight in self.values)
        if len(self.values) <= LISTED:
            return f"class weights {listed}"
        digest = hashlib.sha256(listed.encode()).hexdigest()
        return f"{len(self.values)} class weights of sha256 {digest}"


def balanced_weights(labels: Tensor, num_classes: int) -> list[float]:
    """n / (C * n_c) for n labels, C classes and n_c labels of a class, as scikit-learn has it.

    The mean weight of the labels is 1, so that the loss keeps its scale.

    Raises:
        ValueError: a class has no label.
    """
    counts = torch.bincount(labels, minlength=num_classes)
    if len(counts) != num_classes or not counts.all():
        raise ValueError(
            f"class_weights: 'balanced' needs labels of each of the {num_classes} classes; the "
            f"labels per class are {counts.tolist()}; give the weights as numbers"
        )
    return (len(labels) / (num_classes * counts.double())).tolist()


def labels_in(dataset: Any) -> Tensor:
    """The labels of a data set, int64 [N], without reading an image.

    They come from `labels`, `targets` or `samples` (pairs of file and label), as torchvision's data
    sets and those of pcx have them, or from the column "label" or "labels" of Hugging Face's.

    Raises:
        ValueError: the data set has none of these.
    """
    if isinstance(dataset, Subset):
        return labels_in(dataset.dataset)[torch.as_tensor(dataset.indices)]
    parts = getattr(dataset, "datasets", None)  # of a ConcatDataset
    if isinstance(parts, list | tuple) and parts:
        return torch.cat([labels_in(part) for part in parts])
    found = next((f for f in _listed(dataset) if f is not None), None)
    if found is None:
        raise ValueError(
            f"class_weights: a {type(dataset).__name__} does not list its labels, and images are "
            "not read to count them; give the weights as numbers"
        )
    return torch.as_tensor(found, dtype=torch.int64)


def _listed(dataset: Any) -> Iterable[Any]:
    """What may be the labels, the likeliest first; None where a data set has no such."""
    for name in ("labels", "targets"):
        yield getattr(dataset, name, None)
    samples = getattr(dataset, "samples", None)
    yield None if samples is None else [label for _, label in samples]
    tensors = getattr(dataset, "tensors", None)  # of a TensorDataset
    yield tensors[-1] if isinstance(tensors, tuple) and tensors else None
    columns = getattr(dataset, "column_names", None)
    for name in ("label", "labels"):
        yield dataset[name] if isinstance(columns, list) and name in columns else None


def _checked(class_weights: Any) -> tuple[float, ...]:
    """The weights as numbers.

    Raises:
        ValueError: they are no list of numbers, one is negative or not finite, or all are 0.
    """
    if isinstance(class_weights, Tensor):
        class_weights = class_weights.tolist()
    expected = "expected a number for each class, 0 or more and not all 0"
    if isinstance(class_weights, str | bytes | Mapping) or not isinstance(class_weights, Iterable):
        raise ValueError(f"class_weights: got {class_weights!r}, {expected}")
    weights = list(class_weights)
    for i, weight in enumerate(weights):
        try:
            weights[i] = float(weight)
        except (TypeError, ValueError):
            raise ValueError(f"class_weights[{i}]: got {weight!r}, {expected}") from None
        if not (math.isfinite(weights[i]) and weights[i] >= 0):
            raise ValueError(f"class_weights[{i}]: got {weight}, {expected}")
    if not any(weights):
        raise ValueError(f"class_weights: got {weights}, {expected}")
    return tuple(weights)
