"""Folders of photos: one folder for each class, with folders of the splits around them or without.

photos/cat/1.jpg            photos/train/cat/1.jpg
photos/dog/2.png            photos/val/cat/2.jpg        (val or validation; test)
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm.data
from PIL import Image, UnidentifiedImageError

from pcx.arguments import some_of
from pcx.tasks.images import FileImages, as_rgb

SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
UNREADABLE = ("MPEG", "EPS", "WMF", "HDF5", "GRIB", "BUFR", "FITS")  # by Pillow alone
PARTS = 10  # of which val and test are one each, where there are no folders for them
SHOWN = 3  # files in a message
Sample = tuple[Path, int]


@dataclass
class Photos:
    """What a folder of photos holds.

    Attributes:
        classes: names of the class folders, sorted; a label is a place in it.
        samples: by split, (file, label) of each photo; a split that is empty is not there.
        how: which photos are in which split, and why, in words.
        left_out: files named like images that are none, with the reason.
        passed_over: names of what lies beside the class folders: other folders, and photos.
        digest: of the files in each split, by their places in the folder.
    """

    classes: list[str]
    samples: dict[str, list[Sample]]
    how: str
    left_out: list[tuple[Path, str]] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    digest: str = ""

    def described(self) -> str:
        """The classes, the size of each split, and what was left out, in a line each."""
        counts = ", ".join(f"{name} {len(rows)}" for name, rows in self.samples.items())
        lines = [f"{len(self.classes)} classes, photos: {counts} ({self.how})"]
        if self.left_out:
            some = "; ".join(f"{path} ({why})" for path, why in self.left_out[:SHOWN])
            more = f"; and {len(self.left_out) - SHOWN} more" if len(self.left_out) > SHOWN else ""
            lines.append(f"left out {len(self.left_out)} files that are no images: {some}{more}")
        if self.passed_over:
            lines.append(f"not in a class folder, so not used: {some_of(self.passed_over)}")
        return "\n".join(lines)


def find_photos(root: Path) -> Photos:
    """Finds the classes, the photos and the splits of a folder.

    Where the folder has none for the splits, a tenth of each class is "val" and a tenth "test",
    chosen by a hash of the files' names, so that each run finds the same. With a folder for test
    alone, "val" is a tenth of train. With one for val alone, there is no "test".

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no class folders with photos, a single class, a class without a usable
            photo, or too few photos for a split; or a class is in val or test that is not in train.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder, expected one with a folder of each class")
    given = _split_folders(root)
    if "train" not in given and given:
        raise ValueError(
            f"{root}: it has a folder {given[min(given)].name!r} and none named 'train'; add it, "
            "or give the folder of each class directly"
        )
    names = [p.name.lower() for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")]
    if not given and names and all(any(name in of for of in SPLITS.values()) for name in names):
        raise ValueError(
            f"{root}: no photos in folders of {', '.join(sorted(names))}; expected a folder for "
            f"each class in them, such as {root / names[0] / 'cat' / '1.jpg'}"
        )
    left_out: list[tuple[Path, str]] = []
    found = {
        split: _by_class(folder, left_out) for split, folder in (given or {"train": root}).items()
    }
    empty = next((split for split, table in found.items() if not table and split != "train"), None)
    if empty is not None:
        raise ValueError(
            f"{root}: {given[empty]} has no photos in class folders; add some, or take it away"
        )
    classes = sorted(found["train"])
    _check_classes(root, given.get("train", root), classes, found)
    if len(found) == 3:
        how = "split by folder"
    elif "val" in found:
        how = "split by folder; there is no test"
    else:
        moved = ("val",) if "test" in found else ("val", "test")
        of_train = _drawn(found.pop("train"), root, moved)
        found = {**of_train, **found}
        tenths = " and ".join(f"a tenth is {name}" for name in moved)
        how = f"of each class {tenths}, chosen by a hash of the file's name"
    samples = {
        split: [(path, classes.index(c)) for c, paths in sorted(table.items()) for path in paths]
        for split in SPLITS
        if (table := found.get(split))
    }
    samples = {split: rows for split, rows in samples.items() if rows}
    if "val" not in samples:
        raise ValueError(
            f"{root}: too few photos to keep some for validation; give at least three of a class"
        )
    return Photos(
        classes, samples, how, left_out, _passed_over(root, given), _digest(root, samples)
    )


def splits_of(photos: Photos, config: dict[str, Any]) -> dict[str, Any]:
    """The data sets of each split, augmented for training as timm does."""
    plain = timm.data.create_transform(**config, is_training=False)
    augmented = timm.data.create_transform(**config, is_training=True)
    rows = {**photos.samples, "trainval": photos.samples["train"] + photos.samples["val"]}
    return {
        split: FileImages(
            samples,
            augmented if split.startswith("train") else plain,
            plain,
            classes=photos.classes,
        )
        for split, samples in rows.items()
    }


def image_files(folder: Path) -> Iterator[Path]:
    """The files in a folder and below that are named like images, sorted; hidden ones are not."""
    suffixes = _suffixes()
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in suffixes:
                yield Path(place, name)


def why_no_image(path: Path) -> str | None:
    """Why a file is no whole image, by its header and its end; None where it is one."""
    try:
        with Image.open(path) as image:
            kind = image.format
            if kind in ("JPEG", "PNG"):
                image.verify()
            else:
                as_rgb(image)  # reads all of it
    except Image.DecompressionBombError:
        return "it has too many pixels"
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        return "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
    if kind == "JPEG" and not _ends_as_jpeg(path):
        return "the file is cut short"
    return None


def _ends_as_jpeg(path: Path) -> bool:
    """Whether a JPEG's end marker stands near its end; some cameras write more behind it.

    An end marker before the last start of a scan is that of a preview.
    """
    with open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 65536))
        tail = file.read()
    return b"\xff\xd9" in tail[max(0, tail.rfind(b"\xff\xda")) :]


def _suffixes() -> set[str]:
    """Ends of the names of images, without films and vector formats, which Pillow lists too."""
    return {
        suffix
        for suffix, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in UNREADABLE
    }


def _passed_over(root: Path, given: dict[str, Path]) -> list[str]:
    """Photos that lie beside the class folders, and folders beside those of splits."""
    suffixes = _suffixes()
    beside = [p for place in {root, *given.values()} for p in place.iterdir()]
    found = {p for p in beside if p.is_file() and p.suffix.lower() in suffixes}
    if given:
        found |= {p for p in root.iterdir() if p.is_dir()} - set(given.values())
    return sorted(p.relative_to(root).as_posix() for p in found if not p.name.startswith("."))


def _split_folders(root: Path) -> dict[str, Path]:
    """The folders named as splits that hold folders themselves, as classes do not."""
    there = {
        p.name.lower(): p
        for p in sorted(root.iterdir())
        if p.is_dir() and any(inner.is_dir() for inner in p.iterdir())
    }
    found = {
        split: next((there[name] for name in names if name in there), None)
        for split, names in SPLITS.items()
    }
    return {split: path for split, path in found.items() if path is not None}


def _by_class(folder: Path, left_out: list[tuple[Path, str]]) -> dict[str, list[Path]]:
    """The photos of each class folder; empty folders are none.

    Raises:
        ValueError: a folder has files, and none that can be used, so that its class would vanish.
    """
    found: dict[str, list[Path]] = {}
    for place in sorted(folder.iterdir()):
        if not place.is_dir() or place.name.startswith("."):
            continue
        for path in image_files(place):
            why = why_no_image(path)
            if why is None:
                found.setdefault(place.name, []).append(path)
            else:
                left_out.append((path, why))
        if place.name in found:
            continue
        files = [p for p in place.rglob("*") if p.is_file() and not p.name.startswith(".")]
        if files:
            raise ValueError(
                f"{place}: none of its {len(files)} files is an image that can be read, such as "
                f"{files[0].name}; convert them to JPEG or PNG, or take the folder away"
            )
    return found


def _check_classes(
    root: Path, train: Path, classes: list[str], found: dict[str, dict[str, list[Path]]]
) -> None:
    if not classes:
        raise ValueError(
            f"{root}: no photos in folders of {train}; expected a folder for each class, such as "
            f"{train / 'cat' / '1.jpg'}"
        )
    if len(classes) == 1:
        raise ValueError(
            f"{root}: a single class, {classes[0]!r}; put photos of another class beside it"
        )
    for split, table in found.items():
        unknown = sorted(set(table) - set(classes))
        if unknown:
            raise ValueError(
                f"{root}: the class {unknown[0]!r} of {split} has no photos in {train}; add some, "
                "or take it away"
            )


def _drawn(
    table: dict[str, list[Path]], root: Path, moved: Iterable[str]
) -> dict[str, dict[str, list[Path]]]:
    """Takes a tenth of each class, and one photo at least of three, out of train for each split."""
    found: dict[str, dict[str, list[Path]]] = {"train": {}, **{name: {} for name in moved}}
    for name, paths in table.items():
        rest = sorted(paths, key=lambda path: _hashed(path.relative_to(root)))
        for split in moved:
            count = max(len(paths) // PARTS, 1) if len(paths) >= 3 else 0
            found[split][name], rest = sorted(rest[:count]), rest[count:]
        found["train"][name] = sorted(rest)
    return found


def _hashed(path: Path) -> bytes:
    return hashlib.sha256(path.as_posix().encode()).digest()


def _digest(root: Path, samples: dict[str, list[Sample]]) -> str:
    text = "\n".join(
        f"{split} {path.relative_to(root).as_posix()}"
        for split, rows in samples.items()
        for path, _ in rows
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]
