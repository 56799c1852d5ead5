"""What a loader yields: batches of images and labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset


def images_and_labels(batch) -> tuple:
    """Splits a loader's batch into images and labels.

    The images may themselves be whatever the model takes, such as NaFlexViT's dict of patches.
    """
    if isinstance(batch, Mapping) and set(batch) == {"pixel_values", "labels"}:
        return batch["pixel_values"], batch["labels"]
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        what = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else batch
        if isinstance(batch, Mapping):
            what = f"a dict of {sorted(batch)}"
        raise ValueError(
            f"loader: it yields {what}, expected (images, labels), or a dict of 'pixel_values' and "
            "'labels'"
        )
    return batch[0], batch[1]


def check_loader(loader: Any, name: str = "loader") -> None:
    """Raises a ValueError where something else is given in the place of a loader of batches."""
    if isinstance(loader, Dataset) and not hasattr(loader, "__iter__"):
        raise ValueError(
            f"{name}: a {type(loader).__name__}, which gives single samples; wrap it in "
            "torch.utils.data.DataLoader(dataset, batch_size=64)"
        )
    batch = isinstance(loader, tuple) and len(loader) == 2 and isinstance(loader[0], Tensor)
    batches = isinstance(loader, Iterable) or hasattr(loader, "__getitem__")
    if batch or isinstance(loader, Tensor | str | bytes) or not batches:
        what = "a single batch" if batch else f"a {type(loader).__name__}"
        raise ValueError(
            f"{name}: {what}, expected a DataLoader, or another iterable of (images, labels)"
        )


def rows_of(labels: Any) -> Tensor:
    """Labels that are a tensor with a row per sample.

    Raises:
        ValueError: they are something else.
    """
    if isinstance(labels, Tensor) and labels.dim():
        return labels
    if isinstance(labels, Tensor | int | float):
        raise ValueError("loader: it yields single samples; give it a batch_size")
    raise ValueError(
        f"loader: its labels are a {type(labels).__name__}, expected a tensor with a row per "
        "sample; let its collate_fn make one"
    )


def check_images(images: Any) -> None:
    """Raises a ValueError where a batch's images hold no tensor."""
    tensors = [x for x in tree_leaves(images) if isinstance(x, Tensor)]
    if not tensors:
        first = images[0] if isinstance(images, list | tuple) and images else images
        raise ValueError(
            f"loader: its images are of type {type(first).__name__}, expected a tensor "
            "[B, 3, H, W]; let its transform make tensors, as model.transform() does"
        )
