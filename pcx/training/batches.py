"""What a loader's batch holds."""

from __future__ import annotations

from collections.abc import Mapping


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
