"""Predictions of a tuned model: from photos to names of classes and probabilities."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pcx.arguments import whole_number
from pcx.models.base import TunedModel, check_module, keeping_modes
from pcx.models.peft_model import tuned
from pcx.tasks.images import as_rgb, opened, upright
from pcx.tasks.photos import image_files
from pcx.training.batches import logits_from
from pcx.training.evaluation import accelerator_for
from pcx.training.execution import check_execution, compiled, prepared
from pcx.training.objectives import MultiLabel, Regression, Segmentation, objective_of

_MAGIC = ("*", "?", "[")


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image: its classes from the most probable on.

    Attributes:
        source: the image's path as it was found, or its place among the images, such as "[3]".
        labels: numbers of the classes, [k].
        names: their names, or their numbers as text where the model knows no names.
        probabilities: of each, 0..1. They sum to 1 over all classes, but of a multi-label model.
    """

    source: str
    labels: list[int]
    names: list[str]
    probabilities: list[float]

    @property
    def name(self) -> str:
        """The name of the most probable class."""
        return self.names[0]

    @property
    def probability(self) -> float:
        """The probability of the most probable class."""
        return self.probabilities[0]


class Predictions(list[Prediction]):
    """A list of a `Prediction` for each image that could be read, in the order given.

    Attributes:
        skipped: (path, reason) of each file that is no image.
    """

    def __init__(self, rows: Iterable[Prediction], skipped: Sequence[tuple[str, str]]):
        super().__init__(rows)
        self.skipped = list(skipped)


def predict(
    model: nn.Module,
    images: Any,
    *,
    top: int | None = 1,
    batch_size: int = 64,
    num_workers: int = 0,
    amp: str = "no",
    execution: str = "auto",
) -> Predictions:
    """The most probable classes of images, of files, PIL images or tensors.

    Images of files and of PIL are prepared by `model.transform()`, as in evaluation. Their EXIF
    data turns them, 16 bits are scaled to 8, and what is transparent shows white. Tensors are
    taken as they are.

    Args:
        model: a tuned model, or a model of peft. It is put in eval mode for the call.
        images: a path, of a file, of a folder (all images in it and below) or with wildcards
            ("photos/*.jpg"); a PIL image; a tensor [3, H, W] or [B, 3, H, W] as the backbone
            expects it; or a sequence of these.
        top: how many classes of each image are given, None for all.
        batch_size: images that are computed at once.
        num_workers: processes that read images.
        amp: "no", "bf16" or "fp16".
        execution: as that of `pcx.evaluate`.

    Returns:
        One `Prediction` for each image; `skipped` lists the files that are no images.

    Raises:
        ValueError: an argument is out of range, `images` holds something else, none of the files is
            an image, or the model gives no probabilities of classes (a regression, features).
        FileNotFoundError: a path leads to nothing.
    """
    check_module("model", model)
    known = tuned(model)
    count = max(2, known.num_classes) if top is None else whole_number("top", top, 1)
    batch_size = whole_number("batch_size", batch_size, 1)
    probable = _probable(known)
    items = list(_items(images))
    if not items:
        raise ValueError("images: none given")
    with accelerator_for(amp, 0) as accelerator:
        check_execution(execution, accelerator.device)
        placed: Any = known.to(accelerator.device)
        loader = DataLoader(
            _Read(items, known),
            batch_size,
            num_workers=whole_number("num_workers", num_workers),
            collate_fn=list,
        )
        called = compiled(placed, execution)

        def run(batch: Tensor) -> tuple[Tensor, Tensor]:
            with accelerator.autocast():
                logits = logits_from(placed, called, batch, "images: the model cannot take them")
            if logits.dim() != 2:
                raise ValueError(
                    f"model: it gives {list(logits.shape)}, and no classes of an image; call it "
                    "itself, as model(images).argmax(1) for a class per pixel"
                )
            found = probable(logits.float())
            values, labels = found.topk(min(count, found.shape[-1]), dim=-1)
            return values, labels

        step = prepared(lambda: run, accelerator.device, execution)
        with keeping_modes(placed), torch.no_grad():
            placed.eval()
            return _predicted(loader, step, known, accelerator.device)


def _predicted(
    loader: DataLoader, step: Callable[..., Any], model: TunedModel, device: torch.device
) -> Predictions:
    rows: list[Prediction] = []
    skipped: list[tuple[str, str]] = []
    for batch in loader:
        skipped += [(source, why) for source, why in batch if isinstance(why, str)]
        good = [(source, x) for source, x in batch if not isinstance(x, str)]
        if good:
            values, labels = step(_stacked(good).to(device))
            rows += _rows([source for source, _ in good], values, labels, model)
    if not rows:
        raise ValueError(
            f"images: none of {len(skipped)} is an image; the first is {skipped[0][0]} "
            f"({skipped[0][1]})"
        )
    return Predictions(rows, skipped)


def _probable(model: TunedModel) -> Callable[[Tensor], Tensor]:
    """From logits to probabilities, by the objective that the model was trained with."""
    if model.num_classes == 0:
        raise ValueError("model: it has no head, and so no classes; give it num_classes")
    objective = objective_of(model)
    if objective in (Regression.name, Segmentation.name):
        raise ValueError(
            f"model: it was trained for {objective}, and gives no classes of an image; call it "
            "itself"
        )
    if objective == MultiLabel.name:
        return torch.sigmoid
    if model.num_classes == 1:  # above 0 for class 1, as in evaluation
        return lambda logits: torch.cat([torch.sigmoid(-logits), torch.sigmoid(logits)], -1)
    return lambda logits: logits.softmax(-1)


def _rows(
    sources: list[str], values: Tensor, labels: Tensor, model: TunedModel
) -> list[Prediction]:
    broken = values.isnan().any(-1).tolist()
    if any(broken):
        raise ValueError(
            f"images: {sources[broken.index(True)]} gives NaN; its numbers are not finite, or the "
            "model's weights are not"
        )
    names = model.class_names or [str(i) for i in range(max(2, model.num_classes))]
    return [
        Prediction(source, numbers, [names[i] for i in numbers], probabilities)
        for source, numbers, probabilities in zip(
            sources, labels.tolist(), values.tolist(), strict=True
        )
    ]


def _items(images: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """(source, path | PIL image | tensor [3, H, W]) of each image."""
    if isinstance(images, str | os.PathLike):
        for path in _files(os.fspath(images)):
            yield str(path), path
    elif isinstance(images, Image.Image):
        yield place or "[0]", images
    elif isinstance(images, Tensor):
        if images.dim() not in (3, 4) or not images.is_floating_point():
            raise ValueError(
                f"images{place}: a tensor {list(images.shape)} of {images.dtype}, expected "
                "[3, H, W] or [B, 3, H, W], normalised as model.transform() does it"
            )
        batch = images if images.dim() == 4 else images[None]
        for i, image in enumerate(batch):
            yield (place if images.dim() == 3 and place else f"{place}[{i}]"), image
    elif isinstance(images, Iterable) and not isinstance(images, bytes | dict):
        for i, each in enumerate(images):
            yield from _items(each, f"{place}[{i}]")
    else:
        raise ValueError(
            f"images{place}: a {type(images).__name__}, expected a path, a PIL image, a tensor, or "
            "a sequence of these"
        )


def _files(given: str) -> list[Path]:
    """The files that a path, a folder or a pattern stands for; folders give their images alone."""
    if not given:
        raise ValueError("images: an empty path; give a file, a folder or a pattern")
    path = Path(given).expanduser()
    if path.exists():
        found = list(image_files(path)) if path.is_dir() else [path]
    else:
        pattern = set(given) & set(_MAGIC)
        matched = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))] if pattern else []
        if not matched:
            raise FileNotFoundError(f"images: {given}: no such file or folder")
        each = (image_files(p) if p.is_dir() else [p] for p in matched)
        found = list(dict.fromkeys(file for files in each for file in files))
    if not found:
        raise ValueError(f"images: {given} has no files that are named like images")
    return found


class _Read(Dataset):
    """Prepared images, or the reason why a file is none."""

    def __init__(self, items: list[tuple[str, Any]], model: TunedModel):
        self.items, self.transform = items, model.transform()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[str, Tensor | str]:
        source, item = self.items[i]
        if isinstance(item, Tensor):
            return source, item
        if isinstance(item, Image.Image):
            try:
                return source, self.transform(as_rgb(upright(item)))
            except (ValueError, ZeroDivisionError) as error:  # modes, and images without pixels
                raise ValueError(f"images{source}: {error}; give another image") from error
        try:
            return source, self.transform(opened(item, item))
        except (ValueError, FileNotFoundError) as error:
            return source, str(error).removeprefix(f"{item}: ")


def _stacked(good: list[tuple[str, Tensor]]) -> Tensor:
    shapes = {tuple(image.shape) for _, image in good}
    if len(shapes) > 1:
        raise ValueError(f"images: tensors of shapes {sorted(shapes)}, expected one shape for all")
    return torch.stack([image for _, image in good])
