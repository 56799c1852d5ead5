"""Names of classes: what a loader's data set says of them, and text in the place of labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pcx.models.base import TunedModel
from pcx.models.peft_model import known_by

SHOWN = 5  # names in a message
OF_MODEL = "the model's"


def class_names_of(loader: Any) -> list[str] | None:
    """The names of the classes in the order of their labels, as a loader's data set says them.

    Read from `classes` or `class_to_idx` (torchvision's data sets, timm's readers), or from the
    names of the feature "label" or "labels" of Hugging Face's; None where there are none.
    """
    return _names(getattr(loader, "dataset", None))


def _names(dataset: Any) -> list[str] | None:
    parts = getattr(dataset, "datasets", None)  # of a ConcatDataset
    if isinstance(parts, list | tuple) and parts:
        found = [_names(part) for part in parts]
        return found[0] if all(names == found[0] for names in found) else None
    for holder in (dataset, getattr(dataset, "reader", None)):
        listed = getattr(holder, "classes", None)
        if isinstance(listed, list | tuple) and listed and all(isinstance(n, str) for n in listed):
            return list(listed)
        places = getattr(holder, "class_to_idx", None)
        if isinstance(places, Mapping) and sorted(places.values()) == list(range(len(places))):
            return sorted(map(str, places), key=lambda name: places[name])
    features = getattr(dataset, "features", None)
    for key in ("label", "labels"):
        listed = (
            getattr(features.get(key), "names", None) if isinstance(features, Mapping) else None
        )
        if listed:
            return list(listed)
    inner = getattr(dataset, "dataset", None)  # of a Subset, and of whatever wraps a data set so
    return None if inner is None else _names(inner)


def agreed_names(model: nn.Module, loader: Any, val_loader: Any = None) -> list[str] | None:
    """The names that a model and its loaders agree on; None where none of them knows any.

    Raises:
        ValueError: a loader's classes are others than the model's, or than the other loader's.
    """
    given = known_by(model)
    known, whose = (None if given is None else given.class_names), OF_MODEL
    for argument, each in (("loader", loader), ("val_loader", val_loader)):
        found = class_names_of(each)
        if known is None:
            known, whose = found, "the loader's"
        elif found is not None and found != known:
            raise ValueError(_differ(argument, found, known, whose))
    return known


def _differ(argument: str, found: list[str], known: list[str], whose: str) -> str:
    pairs = enumerate(zip(found, known, strict=False))
    first = next((i for i, (a, b) in pairs if a != b), min(len(found), len(known)))
    hint = ", or set model.record.class_names = None to train it on others"
    return (
        f"{argument}: its classes are {_some(found)}, and {whose} are {_some(known)}; they differ "
        f"from label {first} on. Give data of the same classes in the same order"
        f"{hint if whose == OF_MODEL else ''}"
    )


def keep_names(model: TunedModel, names: list[str] | None) -> None:
    """Keeps the names that a model was trained on, where it has a logit for each."""
    if names is not None and len(names) == model.num_classes:
        model.record.class_names = list(names)


def labels_of_text(labels: Sequence[str], names: list[str] | None) -> Tensor:
    """The places of names of classes, int64 [B].

    Raises:
        ValueError: the names of the classes are not known, or a label is none of them.
    """
    if names is None:
        raise ValueError(
            f"loader: its labels are text ({_some(labels)}), and the order of the classes is not "
            "known; set model.record.class_names to all names in the order of the logits"
        )
    places = {name: i for i, name in enumerate(names)}
    unknown = [label for label in labels if label not in places]
    if unknown:
        raise ValueError(
            f"loader: its label {unknown[0]!r} is none of the classes {_some(names)}; correct the "
            "label, or set model.record.class_names"
        )
    return torch.tensor([places[label] for label in labels])


def _some(names: Sequence[str]) -> str:
    more = f", ... ({len(names)})" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more
