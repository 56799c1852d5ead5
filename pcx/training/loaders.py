"""Reading each sample of a loader once, in order, without augmentation."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import timm.data
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, DataLoaderShard
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)

_DIVIDED = (BatchSamplerShard, DataLoaderShard, DataLoaderDispatcher, DistributedSampler)
_RANDOM = (
    "Random",
    "AutoAugment",
    "RandAugment",
    "AugMix",
    "TrivialAugment",
    "Jitter",
    "GaussianBlur",
    "GaussianNoise",
    "Elastic",
)


@dataclass(frozen=True)
class PlainLoader:
    """A loader that yields each sample once, in order, and a description of it for people."""

    loader: Any
    description: str


def plain_loader(loader, config: dict) -> PlainLoader:
    """Rebuilds a training loader so that each sample comes once, in order, without augmentation.

    Shuffling, `drop_last` and random transforms are taken away from a `DataLoader` over a map-style
    data set; a transform with random parts is replaced by the data set's own `eval_transform`, or
    else by timm's evaluation transform for `config`. Anything else is read as it is, and the
    description says so.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return PlainLoader(
            loader, "the loader as given (not a DataLoader over a map-style data set)"
        )
    batches = loader.batch_sampler
    if batches is not None and type(batches) is not BatchSampler:
        return PlainLoader(loader, f"the samples that {type(batches).__name__} gives, as given")
    dataset, transform = _without_augmentation(loader.dataset, config)
    given, sampler, said = getattr(batches, "sampler", loader.sampler), None, "in order"
    if isinstance(given, SubsetRandomSampler):
        dataset = Subset(dataset, list(given.indices))
    elif not isinstance(given, RandomSampler | SequentialSampler):
        sampler, said = given, f"as {type(given).__name__} gives them"
    size = loader.batch_size or getattr(batches, "batch_size", None)
    plain = rebuilt(loader, dataset, batch_size=size, sampler=sampler)
    return PlainLoader(plain, f"{len(dataset)} samples {said}, {transform}")


def rebuilt(loader: DataLoader, dataset: Any, **order: Any) -> DataLoader:
    """Builds a loader over another data set or order, with the same workers and collation."""
    return DataLoader(
        dataset,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        **order,
    )


def is_divided(loader: Any) -> bool:
    """Whether a loader gives each process a share already, by its sampler or by Accelerate."""
    batches = getattr(loader, "batch_sampler", None)
    parts = (loader, batches, getattr(loader, "sampler", None), getattr(batches, "sampler", None))
    return any(isinstance(part, _DIVIDED) for part in parts)


def set_epoch(loader: Any, epoch: int) -> None:
    """Tells a loader, or the sampler of one that is divided, which epoch comes."""
    parts: tuple[Any, ...] = (loader, getattr(loader, "sampler", None))
    for part in parts:
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)


def start_workers_anew(loader: Any) -> None:
    """Ends the workers that a loader keeps between passes, whose generators went on with them."""
    loader = getattr(loader, "base_dataloader", loader)  # of Accelerate's
    if getattr(loader, "persistent_workers", False):
        loader._iterator = None


def _without_augmentation(dataset: Any, config: dict) -> tuple[Any, str]:
    if isinstance(dataset, Subset):
        inner, what = _without_augmentation(dataset.dataset, config)
        return _copied(dataset, dataset=inner), what
    if isinstance(dataset, ConcatDataset):
        parts, said = zip(
            *(_without_augmentation(d, config) for d in dataset.datasets), strict=True
        )
        return _copied(dataset, datasets=list(parts)), " and ".join(dict.fromkeys(said))
    transform = getattr(dataset, "transform", None)
    if transform is None or not _is_random(transform):
        return dataset, "transform as given"
    plain = copy.copy(dataset)
    if getattr(dataset, "eval_transform", None) is not None:
        plain.transform = dataset.eval_transform
        return plain, "with the data set's evaluation transform"
    plain.transform = timm.data.create_transform(**config, is_training=False)
    return plain, "with timm's evaluation transform in place of the random one"


def _copied(given: Any, **changed: Any) -> Any:
    """A copy of a data set, whose class may do more than torch's, with other data sets within."""
    copied = copy.copy(given)
    for name, value in changed.items():
        setattr(copied, name, value)
    return copied


def is_augmented(dataset: Any) -> bool:
    """Whether a data set's transform has random parts that are known."""
    if isinstance(dataset, Subset):
        return is_augmented(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return any(map(is_augmented, dataset.datasets))
    return _is_random(getattr(dataset, "transform", None))


def _is_random(transform) -> bool:
    if any(word in type(transform).__name__ for word in _RANDOM):
        return True
    parts = transform if isinstance(transform, nn.Sequential) else None
    parts = getattr(transform, "transforms", parts)
    return isinstance(parts, list | tuple | nn.Sequential) and any(map(_is_random, parts))
