"""Data sets of image files whose prepared pixels are kept between epochs and runs."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader

from pcx.tasks.images import FileImages, ReaderImages
from pcx.tasks.pixel_file import LOG, STAMP, PixelFile
from pcx.tasks.preparation import Preparation, applied, preparation_of

FORMAT = 1  # of the files; another number leaves older files unread


class CachedImages(Dataset):
    """The images of another data set, read from a cache once they are in it.

    The cache keeps uint8 pixels behind the resizes and centre crops that the transform begins
    with. The rest of the transform runs on each read, random parts too. What is read equals what
    the data set itself gives, bit for bit.

    A kept image is used while its file has the same path, size and modification time (in ns), the
    transform begins alike, and Pillow, torchvision and timm have the same versions. `transform` may
    be replaced on a copy, as scoring does; the copy keeps images of its own transform. The parts
    of a transform are not to be changed in place.

    Args:
        dataset: it has `samples`, a sequence of (file, label), and `transform`; dataset[i] is
            (transform(image i), label i). The data set itself is not changed.
        folder: of the cache; it exists.
        key: tells data sets apart that open the same files differently.

    Attributes:
        samples, classes, class_to_idx, targets: the data set's, as far as it has them.
        eval_transform: the data set's, None where it has none.
        reason: why the images of the present transform are not kept; None where they are.
    """

    def __init__(self, dataset: Any, folder: Path, key: str = ""):
        self.samples = list(dataset.samples)
        for name in ("classes", "class_to_idx", "targets"):
            if hasattr(dataset, name):
                setattr(self, name, getattr(dataset, name))
        self.eval_transform = getattr(dataset, "eval_transform", None)
        self.reason: str | None = None
        self._folder = folder
        self._source = dataset
        self._here = os.getcwd()
        self._names = _digest(
            type(dataset).__module__,
            type(dataset).__qualname__,
            key,
            *(self._path(i) for i in range(len(self.samples))),
        )
        self.transform = dataset.transform

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def transform(self) -> Any:
        """The function of a PIL image that is applied to each image."""
        return self._transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self._transform = transform
        found = preparation_of(transform)
        self._file: PixelFile | None = None
        self._preparation: Preparation | None = None
        if isinstance(found, str):
            self._source = copy.copy(self._source)
            self.reason, self._source.transform = found, transform
            return
        self.reason, self._preparation = None, found
        self._key = _digest(str(FORMAT), found.description, self._names)
        path = self._folder / f"{self._key.hex()}.images"
        self._file = PixelFile(path, len(self.samples), found.limit)

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        if self._preparation is None or self._file is None:
            return self._source[i]
        i = range(len(self))[i]
        stamp = self._stamp(i)
        pixels = None if stamp is None else self._file.read(i, stamp)
        if pixels is not None:
            return self._preparation.finished(pixels), self._label(i)
        image, label = self._prepared(i, self._preparation)
        self._check_label(i, label)
        pixels = self._preparation.pixels_of(image)
        if pixels is not None and stamp is not None:
            self._file.write(i, stamp, pixels)
        return applied(self._preparation.rest, image), label

    def _prepared(self, i: int, preparation: Preparation) -> tuple[Any, Any]:
        """The image behind the fixed part of the transform alone, and its label."""
        given: list[Any] = []

        def fixed(image: Any) -> Any:
            given.append(applied(preparation.fixed, image))
            return given[-1]

        source = copy.copy(self._source)
        source.transform = fixed
        item = source[i]
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise ValueError(
                f"dataset: dataset[{i}] is {_described(item)}, expected (image, label)"
            )
        if not any(item[0] is image for image in given):
            raise ValueError(
                f"dataset: dataset[{i}] does not give what dataset.transform returns; a cache "
                "needs (transform(image), label), and nothing else done to the image behind it"
            )
        return item[0], item[1]

    def _path(self, i: int) -> bytes:
        return os.path.join(os.fsencode(self._here), os.fsencode(self.samples[i][0]))

    def _stamp(self, i: int) -> bytes | None:
        """What a kept image must have been written with; None where its file cannot be seen."""
        path = self._path(i)
        try:
            seen = os.stat(path)
        except OSError:
            return None  # the data set's own error names the file
        return _digest(self._key, path, f"{seen.st_size} {seen.st_mtime_ns}")

    def _label(self, i: int) -> Any:
        label, change = self.samples[i][1], getattr(self._source, "target_transform", None)
        return label if change is None else change(label)

    def _check_label(self, i: int, label: Any) -> None:
        expected = self._label(i)
        if not np.array_equal(label, expected):
            raise ValueError(
                f"dataset: dataset[{i}] has the label {label!r}, but dataset.samples[{i}] gives "
                f"{expected!r}; labels must be those of samples, for a cache to know them"
            )


def cached(dataset: Dataset, cache: str | os.PathLike, *, key: str = "") -> Dataset:
    """A data set that reads each image file once, and then from a cache, bit for bit the same.

    The cache keeps the pixels (uint8) behind the resizes and centre crops that the transform
    begins with, in one memory-mapped file for each list of files and transform. Decoding and
    resizing are skipped where they are kept. Random parts of the transform run on each read.

    | transform begins with                     | kept                                           |
    | ----------------------------------------- | ---------------------------------------------- |
    | Resize(h, w); centre crop                 | [3, h, w] of each image                        |
    | Resize(s), then a random crop             | each image of up to 4 s in length, uncropped   |
    | a random part, a function of your own     | nothing; the log `pcx.cache` says why          |

    Any number of processes may read and write a cache at once. On a full disk, in a read-only
    folder or from a damaged file, images that are not in the cache are read from their own files.
    A cache that is no longer needed is deleted as a folder.

    Args:
        dataset: has `samples`, a sequence of (file, label), and `transform`; dataset[i] is
            (transform(image), label). `pcx.tasks.FileImages` and torchvision's ImageFolder do. A
            Subset or ConcatDataset of such data sets is cached too.
        cache: folder of the cache; it and its parents are made.
        key: a name for how the data set opens its files. A class or a loader of your own needs one,
            since the cache cannot see what they do; give another once they do something else.

    Returns:
        A map-style data set of the same length; its `transform` and `eval_transform` are the
        given ones.

    Raises:
        ValueError: the folder cannot be used, the data set has no image files, is a subclass of
            Subset or ConcatDataset, or opens its files in a way of its own without a key.
    """
    folder = cache_folder(cache)
    reason = unsuitable(dataset, key)
    if reason is not None:
        raise ValueError(f"dataset: {reason}")
    found = _wrapped(dataset, folder, key)
    reason = _reason(found)
    if reason is not None:
        LOG.warning("cache: %s is not cached: %s", type(dataset).__name__, reason)
    return found


def cached_splits(splits: Mapping[str, Dataset], folder: Path) -> dict[str, Dataset]:
    """`cached` for each split; a split without image files is given back as it is."""
    done, refused = dict(splits), dict[str, list[str]]()
    for split, dataset in splits.items():
        reason = unsuitable(dataset)
        if reason is None:
            done[split] = _wrapped(dataset, folder)
            reason = _reason(done[split])
        if reason is not None:
            refused.setdefault(reason, []).append(split)
    for reason, names in refused.items():
        LOG.warning("cache: not cached are the splits %s: %s", ", ".join(names), reason)
    return done


def _wrapped(dataset: Any, folder: Path, key: str = "") -> Dataset:
    if type(dataset) is Subset:
        return Subset(_wrapped(dataset.dataset, folder, key), dataset.indices)
    if type(dataset) is ConcatDataset:
        return ConcatDataset([_wrapped(part, folder, key) for part in dataset.datasets])
    return CachedImages(dataset, folder, key)


def _reason(dataset: Any) -> str | None:
    """Why images of a wrapped data set are not kept; None where all are."""
    if type(dataset) is Subset:
        return _reason(dataset.dataset)
    if type(dataset) is ConcatDataset:
        return next(filter(None, map(_reason, dataset.datasets)), None)
    return dataset.reason


_GIVE = (
    "give a data set that has `samples`, such as pcx.tasks.FileImages([(file, label), ...], "
    "transform)"
)


def unsuitable(dataset: Any, key: str = "") -> str | None:
    """Why a data set cannot be cached, whatever its transform; None where it can be."""
    if type(dataset) is Subset:
        return unsuitable(dataset.dataset, key)
    if type(dataset) is ConcatDataset:
        return next(filter(None, (unsuitable(part, key) for part in dataset.datasets)), None)
    name = type(dataset).__name__
    if isinstance(dataset, Subset | ConcatDataset):
        return f"{name} may change what it gives; cache the data set within it, and wrap that again"
    found = _without_files(dataset, name)
    if found is not None:
        return f"{found}; {_GIVE}"
    if not key and not _opens_as_known(dataset):
        return (
            f"{name} opens its files in a way of its own, which the cache cannot see; name it by "
            'key=, such as key="grey 1", and give another once it changes'
        )
    return None


def _opens_as_known(dataset: Any) -> bool:
    if type(dataset) is ImageFolder:
        return dataset.loader is default_loader
    return type(dataset) in (FileImages, ReaderImages)


def _described(item: Any) -> str:
    size = f" of {len(item)}" if isinstance(item, tuple | list) else ""
    return f"a {type(item).__name__}{size}"


def _without_files(dataset: Any, name: str) -> str | None:
    """Why a cache could not look up the images of a data set; None where it can."""
    if isinstance(dataset, IterableDataset):
        return f"{name} is an IterableDataset, whose images cannot be told apart"
    samples = getattr(dataset, "samples", None)
    if not hasattr(dataset, "transform") or not isinstance(samples, Sequence) or not samples:
        return f"{name} has no image files that a cache could look up"
    first = samples[0]
    if isinstance(first, str | bytes) or not isinstance(first, Sequence) or len(first) != 2:
        return f"{name}.samples[0] is {first!r}, expected (file, label)"
    if not isinstance(first[0], str | os.PathLike):
        return f"{name}.samples[0] begins with a {type(first[0]).__name__}, expected a file"
    return None


def cache_folder(cache: str | os.PathLike) -> Path:
    """Makes the folder of a cache.

    Raises:
        ValueError: a file is in the way, or the folder cannot be made.
    """
    path = Path(cache)
    if path.exists() and not path.is_dir():
        raise ValueError(f"cache: {path} is a file, expected a folder; give another path")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"cache: {path} cannot be made ({error.strerror}); give a folder that can"
        ) from error
    return path.absolute()


def _digest(*parts: str | bytes) -> bytes:
    found = hashlib.blake2b(digest_size=STAMP)
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode()
        found.update(len(data).to_bytes(8, "little") + data)
    return found.digest()
