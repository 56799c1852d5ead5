"""Tasks: data sets that are loaded by name and prepared for a backbone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset

from pcx.arguments import whole_number
from pcx.tasks import listed
from pcx.tasks.digits import NUM_CLASSES as DIGITS_CLASSES
from pcx.tasks.digits import read_digits
from pcx.tasks.image_cache import cache_folder, cached, cached_splits
from pcx.tasks.images import FileImages, MemoryImages
from pcx.tasks.sprites import NUM_CLASSES as SPRITES_CLASSES
from pcx.tasks.sprites import draw_sprites

__all__ = ["FileImages", "Task", "cached", "load_task"]

NAMES = (
    "digits, sprites:count|ori|loc, vtab:<name>, fgvc:<name>, or a name that "
    "timm.data.create_dataset reads"
)


@dataclass
class Task:
    """A classification task: its name, its number of classes and its splits."""

    name: str
    num_classes: int
    splits: dict[str, Dataset]  # "train" and "val" choose settings; "trainval" is both; "test"

    def loader(
        self, split: str, batch_size: int = 64, *, num_workers: int = 0, drop_last: bool = False
    ) -> DataLoader:
        """A loader of one split; "train" and "trainval" are shuffled.

        Batches lie in pinned memory where there is CUDA. Workers of a split that is not shuffled
        stay between passes. Those of a shuffled one start anew with each epoch, whose seed decides
        what they draw: a resumed run would otherwise draw differently.

        Raises:
            ValueError: there is no such split, or a number is out of range.
        """
        if split not in self.splits:
            raise ValueError(f"split: got {split!r}, expected one of {sorted(self.splits)}")
        batch_size = whole_number("batch_size", batch_size, 1)
        num_workers = whole_number("num_workers", num_workers)
        dataset = self.splits[split]
        return DataLoader(
            dataset,
            batch_size=batch_size,
            shuffle=split.startswith("train") and not isinstance(dataset, IterableDataset),
            num_workers=num_workers,
            drop_last=drop_last,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=num_workers > 0 and not split.startswith("train"),
        )


def load_task(
    name: str,
    config: dict,
    *,
    root: str | os.PathLike | None = None,
    cache: str | os.PathLike | None = None,
) -> Task:
    """Loads a task by name and prepares its images as the backbone expects them.

    Args:
        name: "digits" (real scans), "sprites:count", "sprites:ori", "sprites:loc" (rendered),
            "vtab:<name>", "fgvc:<name>" (on disk under root), or a name that
            `timm.data.create_dataset` reads, such as "torch/cifar10", "hfds/..." or "" for a
            folder of folders.
        config: the image settings from `pcx.backbones.inputs.data_config(model)`.
        root: folder of the data sets on disk, "data" by default.
        cache: folder in which prepared pixels are kept, as `cached` does it; None for no cache.
            The log `pcx.cache` says which splits have nothing to keep, and why.

    Raises:
        ValueError: there is no such task, or a list is malformed; the message names file and line.
            Or the folder of the cache cannot be used.
        FileNotFoundError: a folder or file is missing; the message says what was expected there.
    """
    folder = None if cache is None else cache_folder(cache)
    task = _loaded(name, config, root)
    if folder is not None:
        task.splits = cached_splits(task.splits, folder)
    return task


def _loaded(name: str, config: dict, root: str | os.PathLike | None) -> Task:
    family, _, detail = name.partition(":")
    if name == "digits":
        return _in_memory(name, DIGITS_CLASSES, read_digits(), config)
    if family == "sprites":
        if detail not in SPRITES_CLASSES:
            raise ValueError(f"name: {name!r}, expected sprites:{'|'.join(SPRITES_CLASSES)}")
        return _in_memory(name, SPRITES_CLASSES[detail], draw_sprites(detail), config)
    folder = Path("data" if root is None else root)
    if family == "vtab":
        splits, classes = listed.vtab(detail, folder, config)
    elif family == "fgvc":
        splits, classes = listed.fgvc(detail, folder, config)
    elif "/" in name or name in ("", "folder"):
        splits, classes = listed.from_timm(name, folder, config)
    else:
        raise ValueError(f"name: {name!r}, expected one of: {NAMES}")
    return Task(name, classes, splits)


def _in_memory(name: str, classes: int, splits: dict, config: dict) -> Task:
    sets: dict[str, Dataset] = {
        split: MemoryImages(images, labels, config) for split, (images, labels) in splits.items()
    }
    sets["trainval"] = ConcatDataset([sets["train"], sets["val"]])
    return Task(name, classes, sets)
