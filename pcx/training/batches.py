"""What a loader's batch holds, how its labels are checked, and its way to the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pcx.training.objectives import Objective

AHEAD = 2  # batches that are prepared while the GPU works on others


def images_and_labels(batch) -> tuple:
    """Splits a loader's batch into images and labels.

    The images may themselves be whatever the model takes, such as NaFlexViT's dict of patches.
    """
    if isinstance(batch, Mapping) and set(batch) == {"pixel_values", "labels"}:
        return batch["pixel_values"], batch["labels"]
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        what = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else batch
        if isinstance(batch, Mapping):
            what = f"a dict of {sorted(batch)}"
        raise ValueError(
            f"loader: it yields {what}, expected (images, labels), or a dict of 'pixel_values' and "
            "'labels'"
        )
    return batch[0], batch[1]


class LabelCheck:
    """Looks at labels before they go to a GPU, where wrong ones would end the process.

    Attributes:
        shape: of the logits of the last batch, None before one.
    """

    def __init__(self, objective: Objective):
        self.objective = objective
        self.shape: torch.Size | None = None
        self._seen: Any = None

    @staticmethod
    def check_rows(labels: Any) -> None:
        """Raises a ValueError where labels are no batch."""
        if not isinstance(labels, Tensor) or not labels.dim():
            if isinstance(labels, Tensor | int | float):
                raise ValueError("loader: it yields single samples; give it a batch_size")
            raise ValueError(
                f"loader: its labels are a {type(labels).__name__}, expected a tensor with a row "
                "per sample; let its collate_fn make one"
            )

    def before(self, labels: Any) -> None:
        """Looks at the labels of a batch that is about to be computed.

        Raises:
            ValueError: the labels are no batch, or do not fit the logits.
        """
        self.check_rows(labels)
        if self.objective.criterion is None:
            self._seen = self.objective.look_at(labels)
            if self.shape is not None:
                self.objective.check_seen(self._seen, self.shape)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The objective's loss of each sample, once labels are known to fit the logits."""
        self.shape = logits.shape
        if self.objective.criterion is None:
            self.objective.check_seen(self._seen, logits.shape)
        return self.objective.losses(logits, labels, check=False)


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
    loader: Iterable, device: torch.device, check: LabelCheck, wait: LoaderWait | None = None
) -> Iterator[tuple]:
    """Yields a loader's batches as (images, labels) on a device, with their labels checked.

    On CUDA the copies run beside the work on earlier batches, of which at most `AHEAD` wait.
    `wait` measures how long the loader keeps the device waiting; measuring stops the GPU once, at
    the start.
    """
    if device.type != "cuda":
        for batch in loader if wait is None else wait.timed(loader, lambda: 0.0):
            images, labels = images_and_labels(batch)
            check.before(labels)
            yield send_to_device((images, labels), device)
        return
    copies, done = _stream_of_copies(device), deque[torch.cuda.Event]()
    if wait is not None:
        loader = wait.timed(loader, _end_of_work(device, done))
    for batch in loader:
        images, labels = images_and_labels(batch)
        check.before(labels)
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
