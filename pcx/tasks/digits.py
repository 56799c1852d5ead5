"""The handwritten digits that come with scikit-learn: 1797 real scans of 8x8 pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from pcx.extras import need

NUM_CLASSES = 10
SIZES = {"train": 200, "val": 200}  # the rest, 1397, is the test split


def read_digits() -> dict[str, tuple[Tensor, Tensor]]:
    """Images [N, 3, 8, 8] uint8 and labels [N] of "train", "val" and "test".

    The split is always the same.
    """
    need("sklearn", "the task 'digits'")
    from sklearn.datasets import load_digits  # loads scipy, which nothing else here needs

    data = load_digits()
    images = torch.from_numpy(data.images).float().mul(255 / 16).round().to(torch.uint8)
    images = images[:, None].expand(-1, 3, -1, -1)
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    splits, start = {}, 0
    for name, size in {**SIZES, "test": len(labels) - sum(SIZES.values())}.items():
        rows = order[start : start + size]
        splits[name], start = (images[rows], labels[rows]), start + size
    return splits
