"""What a backbone expects of its images, and reading each sample of a loader once."""

from __future__ import annotations

import copy
import functools
import warnings
from dataclasses import dataclass
from typing import Any

import timm.data
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)

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


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) of the images a backbone was made for."""
    backbone: Any = getattr(model, "backbone", model)
    if not hasattr(backbone, "pretrained_cfg"):
        config = getattr(backbone, "config", None)
        size = getattr(config, "image_size", 224)
        size = size if isinstance(size, tuple | list) else (size, size)
        return (getattr(config, "num_channels", 3), *size)
    trained_on = timm.data.resolve_model_data_config(backbone)["input_size"]
    embed: Any = getattr(backbone, "patch_embed", None)
    plain = hasattr(embed, "proj") and not hasattr(embed, "backbone")  # no stem before it
    channels = embed.proj.weight.shape[1] if plain else trained_on[0]
    return (channels, *(getattr(embed, "img_size", None) or trained_on[1:]))


def data_config(model: nn.Module) -> dict:
    """The images a backbone was trained on: input_size (C, H, W), mean, std, crop and so on.

    Read from timm's configuration of the model, or from the image processor that was saved beside
    a Hugging Face checkpoint. A model that has neither gets mean and std 0.5, ViT's own, and a
    warning that says so.
    """
    backbone: Any = getattr(model, "backbone", model)
    if hasattr(backbone, "pretrained_cfg"):
        config = timm.data.resolve_model_data_config(backbone)
        return {**config, "input_size": input_size(model)}
    mean, std = _processor_statistics(backbone)
    return {
        "input_size": input_size(model),
        "mean": mean,
        "std": std,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }


def _processor_statistics(backbone: nn.Module) -> tuple[tuple, tuple]:
    """(mean, std) of the image processor of the checkpoint that a Hugging Face model came from."""
    checkpoint = getattr(getattr(backbone, "config", None), "_name_or_path", "")
    found = _read_processor(checkpoint) if checkpoint else "its checkpoint is not known"
    if not isinstance(found, str):
        return found
    warnings.warn(
        f"model: mean and std of its images are taken to be 0.5, for {found}; normalise your "
        "images as it was trained (DeiT and DINOv2 use ImageNet's)",
        stacklevel=3,
    )
    return (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@functools.cache  # the hub is asked once
def _read_processor(checkpoint: str) -> tuple[tuple, tuple] | str:
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(checkpoint)
        return tuple(processor.image_mean), tuple(processor.image_std)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"{checkpoint} has no image processor to read ({type(error).__name__})"


@dataclass(frozen=True)
class PlainLoader:
    """A loader that yields each sample once, unshuffled, and what was done to get there."""

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
    """A loader over another data set or in another order, whose workers do as this one's."""
    return DataLoader(
        dataset,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        **order,
    )


def _without_augmentation(dataset: Any, config: dict) -> tuple[Any, str]:
    if isinstance(dataset, Subset):
        inner, what = _without_augmentation(dataset.dataset, config)
        return Subset(inner, dataset.indices), what
    if isinstance(dataset, ConcatDataset):
        parts, said = zip(
            *(_without_augmentation(d, config) for d in dataset.datasets), strict=True
        )
        return ConcatDataset(parts), " and ".join(dict.fromkeys(said))
    transform = getattr(dataset, "transform", None)
    if transform is None or not _is_random(transform):
        return dataset, "transform as given"
    plain = copy.copy(dataset)
    if getattr(dataset, "eval_transform", None) is not None:
        plain.transform = dataset.eval_transform
        return plain, "with the data set's evaluation transform"
    plain.transform = timm.data.create_transform(**config, is_training=False)
    return plain, "with timm's evaluation transform in place of the random one"


def _is_random(transform) -> bool:
    if any(word in type(transform).__name__ for word in _RANDOM):
        return True
    parts = transform if isinstance(transform, nn.Sequential) else None
    parts = getattr(transform, "transforms", parts)
    return isinstance(parts, list | tuple | nn.Sequential) and any(map(_is_random, parts))
