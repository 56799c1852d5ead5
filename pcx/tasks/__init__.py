"""Tasks: data sets that are loaded by name and prepared for a backbone."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset

from pcx.arguments import whole_number
from pcx.tasks import listed
from pcx.tasks.digits import NUM_CLASSES as DIGITS_CLASSES
from pcx.tasks.digits import read_digits
from pcx.tasks.image_cache import cache_folder, cached, cached_splits
from pcx.tasks.images import FileImages, MemoryImages
from pcx.tasks.masks import NUM_CLASSES as MASKS_CLASSES
from pcx.tasks.masks import draw_masks
from pcx.tasks.photos import find_photos, splits_of
from pcx.tasks.sprites import NUM_CLASSES as SPRITES_CLASSES
from pcx.tasks.sprites import draw_sprites

__all__ = ["FileImages", "Task", "cached", "load_task"]

NAMES = (
    "digits, sprites:count|ori|loc, masks, vtab:<name>, fgvc:<name>, the path of a folder of "
    "photos with a folder for each class, or a name that timm.data.create_dataset reads"
)
# How names of data sets begin that timm reads; of any other it would read the root instead.
TIMM = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")
# An image as a whole, made to fit: what `timm.data.create_transform` calls so.
SQUASHED = {"crop_pct": 1.0, "crop_mode": "squash"}


@dataclass
class Task:
    """A task: its name, its number of classes, of images or of pixels, and its splits.

    Attributes:
        name: as `load_task` was given it; a folder's own name without the folders around it.
        num_classes: of the labels.
        splits: "train" and "val" choose settings, "trainval" is both, and "test", which some data
            has not.
        transform: how images are prepared for evaluation, as `timm.data.create_transform` takes it.
        found: what was found in a folder of photos, and how it is split, in words.
        digest: of the files in each split of such a folder.
        objective: what the labels are, by its name in `pcx.training.OBJECTIVES`.
    """

    name: str
    num_classes: int
    splits: dict[str, Dataset]
    transform: dict[str, Any] | None = None
    found: str = ""
    digest: str | None = None
    objective: str = "single-label"

    @property
    def held_out(self) -> str:
        """The split that says how good a trained model is: "test", or "val" where there is none."""
        return "test" if "test" in self.splits else "val"

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
            hint = ""
            if split == "test":
                hint = "; this data has no test split, and val is what no training has seen"
            raise ValueError(f"split: got {split!r}, expected one of {sorted(self.splits)}{hint}")
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
            "masks" (rendered, a class for every pixel),
            "vtab:<name>", "fgvc:<name>" (on disk under root), the path of a folder of photos with
            a folder for each class ("folder" takes root itself), or a name that
            `timm.data.create_dataset` reads, such as "torch/cifar10" or "hfds/...".
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
    if name == "masks":
        return replace(
            _in_memory(name, MASKS_CLASSES, draw_masks(), config), objective="segmentation"
        )
    if name in ("", "folder"):
        return _of_photos(Path("data" if root is None else root), config)
    if family == "sprites":
        if detail not in SPRITES_CLASSES:
            raise ValueError(f"name: {name!r}, expected sprites:{'|'.join(SPRITES_CLASSES)}")
        return _in_memory(name, SPRITES_CLASSES[detail], draw_sprites(detail), config)
    if _is_path(name):
        return _of_photos(Path(name).expanduser(), config)
    folder, transform = Path("data" if root is None else root), config
    if family == "vtab":
        splits, classes = listed.vtab(detail, folder, config)
        transform = {**config, **SQUASHED}
    elif family == "fgvc":
        splits, classes = listed.fgvc(detail, folder, config)
        transform = {**config, **listed.FGVC_CROP}
    elif name.lower().startswith(TIMM):
        splits, classes = listed.from_timm(name, folder, config)
    elif "/" in name:
        raise FileNotFoundError(
            f"name: no folder {name}; expected a folder of photos with a folder for each class, or "
            f"a data set of timm, whose name begins with one of {TIMM}"
        )
    else:
        raise ValueError(f"name: {name!r}, expected one of: {NAMES}")
    return Task(name, classes, splits, transform)


def _is_path(name: str) -> bool:
    """Whether a name is a folder's path: there is one, or it is written as a path alone is."""
    return name.startswith((".", "/", "~")) or os.path.isabs(name) or Path(name).is_dir()


def _of_photos(folder: Path, config: dict) -> Task:
    photos = find_photos(folder)
    return Task(
        folder.resolve().name,
        len(photos.classes),
        splits_of(photos, config),
        config,
        photos.described(),
        photos.digest,
    )


def _in_memory(name: str, classes: int, splits: dict, config: dict) -> Task:
    sets: dict[str, Dataset] = {
        split: MemoryImages(images, labels, config) for split, (images, labels) in splits.items()
    }
    sets["trainval"] = ConcatDataset([sets["train"], sets["val"]])
    return Task(name, classes, sets, {**config, **SQUASHED, "interpolation": "bilinear"})
