"""Reads data sets on disk: VTAB-1k's community layout, FGVC's JSON splits, and timm's readers."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import timm.data
import torch
from timm.data import ImageDataset
from torch.utils.data import Dataset, Subset
from torchvision import transforms

from pcx.tasks.images import FileImages, ReaderImages

VTAB_CLASSES = {
    "caltech101": 102,
    "cifar": 100,
    "dtd": 47,
    "oxford_flowers102": 102,
    "oxford_iiit_pet": 37,
    "patch_camelyon": 2,
    "sun397": 397,
    "svhn": 10,
    "resisc45": 45,
    "eurosat": 10,
    "dmlab": 6,
    "kitti": 4,
    "smallnorb_azi": 18,
    "smallnorb_ele": 9,
    "dsprites_loc": 16,
    "dsprites_ori": 16,
    "clevr_dist": 6,
    "clevr_count": 8,
    "diabetic_retinopathy": 5,
}
ALIASES = {"cifar100": "cifar", "oxford_pet": "oxford_iiit_pet"}
FGVC_CROP = {"crop_pct": 224 / 256}
VTAB_LISTS = {"train": "train800", "val": "val200", "trainval": "train800val200", "test": "test"}


def vtab(name: str, root: Path, config: dict) -> tuple[dict[str, Any], int]:
    """Splits and number of classes of a VTAB-1k task.

    The lists are <root>/vtab-1k/<name>/{train800,val200,train800val200,test}.txt. Each line reads
    `images/<split>/NNNNNN.jpg label`. Images are resized without augmentation.
    """
    name = ALIASES.get(name, name)
    if name not in VTAB_CLASSES:
        raise ValueError(f"name: 'vtab:{name}', expected one of {sorted(VTAB_CLASSES)}")
    folder = _existing(root / "vtab-1k" / name, "a folder of VTAB-1k's community layout")
    transform = _resized(config)
    splits = {
        split: FileImages(
            _read_list(folder / f"{file}.txt", folder, VTAB_CLASSES[name]), transform, transform
        )
        for split, file in VTAB_LISTS.items()
    }
    return splits, VTAB_CLASSES[name]


def fgvc(name: str, root: Path, config: dict) -> tuple[dict[str, Any], int]:
    """Splits and number of classes of an FGVC task.

    The files <root>/<name>/{train,val,test}.json are objects {relative path: class}. The label of a
    class is its index among the sorted classes of the training split. Training images are resized
    to 256, cropped at random to the input size and flipped, as in VPT's code.
    """
    folder = _existing(root / name, "a folder with train.json, val.json and test.json")
    tables = {split: _read_table(folder / f"{split}.json") for split in ("train", "val", "test")}
    classes = {c: i for i, c in enumerate(sorted(set(tables["train"].values())))}
    plain = timm.data.create_transform(**{**config, **FGVC_CROP}, is_training=False)
    samples, within = {}, _Within(folder)
    for split, table in tables.items():
        unknown = sorted(set(table.values()) - set(classes), key=str)
        if unknown:
            raise ValueError(
                f"{folder / split}.json: classes {unknown[:5]} are not in train.json; every class "
                "needs training images"
            )
        file = folder / f"{split}.json"
        samples[split] = [(within.place(p, str(file)), classes[c]) for p, c in table.items()]
    samples["trainval"] = samples["train"] + samples["val"]
    augmented = _cropped(config)
    splits = {
        split: FileImages(rows, augmented if split.startswith("train") else plain, plain)
        for split, rows in samples.items()
    }
    return splits, len(classes)


def from_timm(name: str, root: Path, config: dict) -> tuple[dict[str, Any], int]:
    """Splits and number of classes of a data set that `timm.data.create_dataset` reads.

    | split    | with train and validation | with train and test alone               |
    | -------- | ------------------------- | --------------------------------------- |
    | trainval | train                     | train                                   |
    | train    | train                     | nine tenths of train                    |
    | val      | validation                | a tenth of train, drawn by a fixed seed |
    | test     | test, where there is one  | test                                    |
    """
    whole = _timm_split(name, root, ("train",))
    classes = getattr(getattr(whole, "reader", None), "class_to_idx", None)
    val = _timm_split(name, root, ("validation", "val"), classes, missing_ok=True)
    test = _timm_split(name, root, ("test",), classes, missing_ok=val is not None)
    evaluated, plain = copy.copy(whole), timm.data.create_transform(**config, is_training=False)
    whole.transform = timm.data.create_transform(**config, is_training=True)
    for dataset in (evaluated, val, test):
        if dataset is not None:
            dataset.transform = plain
    whole.eval_transform = plain
    splits = {"trainval": whole, "train": whole, "val": val, "test": test}
    if test is None:
        del splits["test"]
    if val is None:
        order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0)).tolist()
        held_out = max(1, len(order) // 10)
        splits["val"] = Subset(evaluated, order[:held_out])
        splits["train"] = Subset(whole, order[held_out:])
    return splits, _class_count(whole, name)


def _timm_split(
    name: str,
    root: Path,
    candidates: tuple[str, ...],
    classes: dict | None = None,
    missing_ok: bool = False,
) -> Any:
    failures = []
    for split in candidates:
        try:
            dataset = timm.data.create_dataset(
                name,
                root=str(root),
                split=split,
                class_map=classes,  # type: ignore[arg-type]  # None is its default
            )
            return ReaderImages(dataset.reader) if type(dataset) is ImageDataset else dataset
        except Exception as error:  # timm has dozens of readers, which raise errors of any type
            failures.append(f"{type(error).__name__}: {error}")
    if missing_ok:
        return None
    raise ValueError(
        f"name: {name!r} under root {root} has no split {candidates[0]!r} that "
        f"timm.data.create_dataset can read ({'; '.join(failures)})"
    )


def _class_count(dataset: Dataset, name: str) -> int:
    for holder in (getattr(dataset, "reader", None), dataset):
        for attribute in ("class_to_idx", "classes"):
            found = getattr(holder, attribute, None)
            if found:
                return len(found)
    raise ValueError(
        f"name: {name!r} does not say how many classes it has; use a data set with classes or "
        "class_to_idx"
    )


def _resized(config: dict) -> transforms.Compose:
    _, height, width = config["input_size"]
    how = transforms.InterpolationMode(config["interpolation"])
    return transforms.Compose(
        [transforms.Resize((height, width), interpolation=how), *_to_tensor(config)]
    )


def _cropped(config: dict) -> transforms.Compose:
    _, height, width = config["input_size"]
    how = transforms.InterpolationMode(config["interpolation"])
    return transforms.Compose(
        [
            transforms.Resize(max(height, width) * 256 // 224, interpolation=how),
            transforms.RandomCrop((height, width)),
            transforms.RandomHorizontalFlip(),
            *_to_tensor(config),
        ]
    )


def _to_tensor(config: dict) -> list:
    return [transforms.ToTensor(), transforms.Normalize(config["mean"], config["std"])]


def _existing(path: Path, what: str) -> Path:
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: not found, expected {what}; pass root=, the folder of the data sets"
        )
    return path


def _read_list(file: Path, folder: Path, classes: int) -> list[tuple[Path, int]]:
    _existing(file, "a list of lines `images/<split>/NNNNNN.jpg label`")
    samples, within = [], _Within(folder)
    for number, line in enumerate(_text(file).splitlines(), 1):
        if not line.strip():
            continue
        path, _, label = line.strip().rpartition(" ")
        if not path or not label.isdecimal() or int(label) >= classes:
            raise ValueError(
                f"{file}, line {number}: {line!r}, expected `path label` with a label of "
                f"0..{classes - 1}"
            )
        samples.append((within.place(path, f"{file}, line {number}"), int(label)))
    if not samples:
        raise ValueError(f"{file}: no lines, expected `images/<split>/NNNNNN.jpg label`")
    return samples


def _read_table(file: Path) -> dict[str, str | int]:
    _existing(file, "a JSON object {relative path: class}")
    try:
        table = json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, line {error.lineno}: not JSON ({error.msg})") from error
    if not isinstance(table, dict) or not table:
        raise ValueError(f"{file}: expected a JSON object {{relative path: class}} with entries")
    kinds = {type(name) for name in table.values()}
    if kinds not in ({int}, {str}):
        raise ValueError(
            f"{file}: its classes are of types {sorted(kind.__name__ for kind in kinds)}, expected "
            "whole numbers for all images, or text for all"
        )
    return table


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = file.read_bytes().count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file}, line {line}: not UTF-8; save it as UTF-8") from None


class _Within:
    """Gives the places of listed images in a folder.

    Args:
        folder: the folder, out of which no list may lead.
    """

    def __init__(self, folder: Path):
        self.folder, self.real = folder, os.path.realpath(folder)

    def place(self, path: str, where: str) -> Path:
        """The place of an image that `where` lists.

        Raises:
            ValueError: the list leads out of the folder, by the path or through a symbolic link.
        """
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise ValueError(
                f"{where}: {path!r} leads out of {self.folder}; list relative paths within it"
            )
        place = self.folder / path
        leads_to = os.path.realpath(place)
        if not leads_to.startswith(os.path.join(self.real, "")):
            raise ValueError(
                f"{where}: {path!r} leads out of {self.folder} through a symbolic link, to "
                f"{leads_to}; put the images themselves there, or make the whole folder a link"
            )
        return place
