"""What a loader's batch holds, how its labels are checked, and its way to the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pcx.backbones.inputs import input_size
from pcx.backbones.outputs import logits_of
from pcx.models.base import TunedModel
from pcx.tasks.batches import check_images, images_and_labels, rows_of
from pcx.training.class_names import labels_of_text
from pcx.training.objectives import Objective

AHEAD = 2  # batches that are prepared while the GPU works on others


def logits_from(model: nn.Module, run: Callable[[Any], Any], images: Any, refused: str) -> Tensor:
    """What a model gives for images.

    Args:
        model: the model.
        run: the function that runs it, such as the compiled model.
        images: the batch.
        refused: how the message begins.

    Raises:
        ValueError: it fails on images that are not what the backbone expects.
    """
    try:
        return logits_of(run(images))
    except Exception as error:  # of any layer
        unlike = _unlike(model, images)
        if unlike is None or isinstance(error, torch.OutOfMemoryError):
            raise
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{refused} ({said}): {unlike}") from error


class BatchCheck:
    """Looks at batches before they go to a GPU, where wrong labels would end the process.

    Args:
        objective: what labels should look like.
        model: that the batches are for.
        names: of the classes, for labels that are text.

    Raises:
        ValueError: the model has no head, and the objective's own loss needs one.

    Attributes:
        shape: of the logits of the last batch, None before one.
    """

    def __init__(self, objective: Objective, model: nn.Module, names: list[str] | None = None):
        if objective.criterion is None and isinstance(model, TunedModel) and not model.num_classes:
            raise ValueError(
                "model: it has no head, so that it gives features and no logits; build it with "
                "num_classes, or give a criterion that takes features"
            )
        self.objective, self.model, self.names = objective, model, names
        self.shape: torch.Size | None = None
        self._checks = objective.criterion is None  # it may take others
        self._seen: Any = None

    def looked_at(self, batch: Any) -> tuple[Any, Tensor]:
        """The images and labels of a batch that is about to be computed.

        Raises:
            ValueError: the batch has no images and labels, or they do not fit model or objective.
        """
        images, labels = images_and_labels(batch)
        check_images(images)
        labels = self.as_rows(labels)
        if isinstance(images, Tensor) and images.dim() == 4 and len(images) != len(labels):
            raise ValueError(
                f"loader: a batch of {len(images)} images has labels of shape "
                f"{tuple(labels.shape)}, expected a row for each image"
            )
        if self._checks:
            self._seen = self.objective.look_at(labels)
            if self.shape is not None:
                self.objective.check_seen(self._seen, self.shape)
        return images, labels

    def as_rows(self, labels: Any) -> Tensor:
        """Labels as a tensor with a row per sample; names of classes become their places.

        Raises:
            ValueError: labels are no batch.
        """
        if isinstance(labels, list | tuple) and labels and isinstance(labels[0], str):
            return labels_of_text(labels, self.names)
        if isinstance(labels, str):
            raise ValueError("loader: it yields single samples; give it a batch_size")
        return rows_of(labels)

    def logits(self, run: Callable[[Any], Any], images: Any) -> Tensor:
        """What a model gives for images.

        Raises:
            ValueError: it fails on images that are not what the backbone expects.
        """
        return logits_from(self.model, run, images, "loader: the model cannot take its images")

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The objective's loss of each sample, once labels are known to fit the logits."""
        self.shape = logits.shape
        if self._checks:
            self.objective.check_seen(self._seen, logits.shape)
        return self.objective.losses(logits, labels, check=False)


def _unlike(model: nn.Module, images: Any) -> str | None:
    """What images are and what was expected, where that is known to differ."""
    if not isinstance(images, Tensor):
        what = f"a dict of {sorted(images)}" if isinstance(images, Mapping) else type(images)
        return f"they are {what}, expected a tensor [B, 3, H, W]"
    shown = str(images.dtype).removeprefix("torch.")
    if not images.is_floating_point():
        return f"they are {shown}; scale and normalise them as model.transform() does"
    backbone: Any = getattr(model, "backbone", model)
    weight = next(model.parameters(), None)
    if weight is None or not (hasattr(backbone, "pretrained_cfg") or hasattr(backbone, "config")):
        return None
    size, given = input_size(model), tuple(images.shape[1:])
    strict = getattr(getattr(backbone, "patch_embed", None), "strict_img_size", True)
    alike = given == size if strict else len(given) == 3 and given[0] == size[0]
    cast = torch.is_autocast_enabled(images.device.type) or images.dtype == weight.dtype
    if alike and cast:
        return None
    wanted = str(weight.dtype).removeprefix("torch.")
    narrow = weight.dtype in (torch.bfloat16, torch.float16) and not cast
    remedy = "model.transform() makes such images"
    if narrow:
        remedy = f"give amp={AMP_OF[weight.dtype]!r}"
    return (
        f"they are {shown} {list(images.shape)}, and the backbone expects {wanted} "
        f"[B, {', '.join(map(str, size))}]; {remedy}"
    )


AMP_OF = {torch.bfloat16: "bf16", torch.float16: "fp16"}


class LoaderWait:
    """Measures how long a pass waits for its loader.

    Attributes:
        seconds: host time in the loader, its start included, while the device had no work left.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, loader: Iterable, ended: Callable[[], float | None]) -> Iterator[Any]:
        """Yields a loader's batches.

        `ended` gives when the device had done all its work, in seconds of `time.perf_counter`;
        None where it still has some.
        """
        start = time.perf_counter()
        for batch in loader:
            self._add(start, ended())
            yield batch
            start = time.perf_counter()
        self._add(start, ended())

    def _add(self, start: float, ended: float | None) -> None:
        if ended is not None:
            self.seconds += max(0.0, time.perf_counter() - max(start, ended))


def placed(
    loader: Iterable, device: torch.device, check: BatchCheck, wait: LoaderWait | None = None
) -> Iterator[tuple]:
    """Yields a loader's batches as (images, labels) on a device, and checked.

    On CUDA the copies run beside the work on earlier batches, of which at most `AHEAD` wait.
    `wait` measures how long the loader keeps the device waiting; measuring stops the GPU once, at
    the start.
    """
    if device.type != "cuda":
        for batch in loader if wait is None else wait.timed(loader, lambda: 0.0):
            yield send_to_device(check.looked_at(batch), device)
        return
    copies, done = _stream_of_copies(device), deque[torch.cuda.Event]()
    if wait is not None:
        loader = wait.timed(loader, _end_of_work(device, done))
    for batch in loader:
        images, labels = check.looked_at(batch)
        current = torch.cuda.current_stream(device)
        with torch.cuda.stream(copies):
            sent = send_to_device((images, labels), device, non_blocking=True)
        current.wait_stream(copies)
        for tensor in tree_leaves(sent):
            if isinstance(tensor, Tensor):
                tensor.record_stream(current)
        yield sent
        done.append(current.record_event(torch.cuda.Event(enable_timing=wait is not None)))
        if len(done) > AHEAD:
            done.popleft().synchronize()


def _end_of_work(device: torch.device, done: deque[torch.cuda.Event]) -> Callable[[], float | None]:
    """For `LoaderWait.timed`, from events behind the work on each batch."""
    torch.cuda.synchronize(device)
    first = torch.cuda.current_stream(device).record_event(torch.cuda.Event(enable_timing=True))
    first.synchronize()
    start = time.perf_counter()

    def ended() -> float | None:
        if not done:
            return start
        return start + first.elapsed_time(done[-1]) / 1000 if done[-1].query() else None

    return ended


@cache
def _stream_of_copies(device: torch.device) -> torch.cuda.Stream:
    """One for all loaders: torch keeps memory for every stream that it has seen."""
    return torch.cuda.Stream(device)
