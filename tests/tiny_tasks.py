"""A tiny random backbone, and made-up tasks in memory."""

import timm
import torch
from torch.utils.data import ConcatDataset, Dataset, TensorDataset

from pcx.tasks import Task


class Unread(Dataset):
    """A test split that must not be touched."""

    def __len__(self):
        raise AssertionError("the test split was touched")

    def __getitem__(self, index):
        raise AssertionError("the test split was touched")


def made_up(seed, size, classes=3):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(size) % classes
    images = torch.randn(size, 3, 32, 32, generator=generator)
    return TensorDataset(images + 0.3 * labels[:, None, None, None], labels)


def tiny_task(name="tiny:a", *, seed=0, test=None):
    """12 images of 3 classes to train on, 6 to choose by, 9 to test on."""
    train, val = made_up(seed, 12), made_up(seed + 1, 6)
    splits = {"train": train, "val": val, "trainval": ConcatDataset([train, val])}
    return Task(name, 3, {**splits, "test": made_up(seed + 2, 9) if test is None else test})


def tiny_backbone(num_classes):
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        depth=2,
        embed_dim=24,
        num_heads=2,
        num_classes=num_classes,
    ).eval()
