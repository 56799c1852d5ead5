"""Reading a data set for scores: batches, losses, sums over processes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from torch.func import functional_call
from torch.utils.data import IterableDataset

from pcx.models.vpt.model import VPT
from pcx.tasks.batches import images_and_labels
from pcx.training.batches import BatchCheck, placed
from pcx.training.class_names import agreed_names
from pcx.training.loaders import is_divided, rebuilt
from pcx.training.losses import OF_INPUT, Losses
from pcx.training.objectives import Objective

FLOAT16_LOSS_SCALE = 1024.0  # of the sum over a batch; gradients would vanish without


Scores = list[Tensor]


class Reader:
    """Yields this process's share of the batches on the model's device and counts its samples."""

    def __init__(
        self,
        model: VPT,
        loader: Any,
        objective: Objective,
        amp: torch.dtype | None,
        progress: bool,
    ):
        self.model, self.objective, self.amp = model, objective, amp
        self.device = model.prompts[0].device
        self.loss_scale = FLOAT16_LOSS_SCALE if amp == torch.float16 else 1.0
        self.rank, self.processes = _processes()
        self.loader = _share(loader, self.rank, self.processes)
        self.samples = self.number = 0  # samples read here in this pass, and batches
        self.total = 0  # read by all processes
        self.labels = BatchCheck(objective, model, agreed_names(model, loader))
        self.bar = Progress(disable=not progress or self.rank > 0, transient=True)

    def batches(
        self, note: str, steps: int = 1, done: tuple[int, int] = (0, 0)
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Those behind the (batches, samples) that are done; the consumer calls `step` after each
        of a batch's `steps` but the last."""
        try:
            total = len(self.loader) * steps
        except TypeError:  # of an iterable data set
            total = None
        self.samples = self.number = 0
        with self.bar:
            task = self.bar.add_task(note, total=total, completed=done[0] * steps)
            for images, labels in placed(self._remaining(done), self.device, self.labels):
                yield images, labels
                self.step()
            self.bar.remove_task(task)

    def _remaining(self, done: tuple[int, int]) -> Iterator[tuple]:
        """The loader's batches that have samples and are not done."""
        for batch in self.loader:
            self.number += 1
            images, labels = images_and_labels(batch)
            labels = self.labels.as_rows(labels)
            if self.number > done[0] and len(labels):
                yield images, labels
            self.samples += len(labels)
            if self.number == done[0]:
                self._check_done(done)
        if self.number < done[0]:
            self._check_done(done)

    def _check_done(self, done: tuple[int, int]) -> None:
        if (self.number, self.samples) != done:
            raise ValueError(
                f"resume: {done[1]} samples in {done[0]} batches are done, where the loader gives "
                f"{self.samples} in {self.number}; give the same one, or another checkpoint_dir"
            )

    def step(self) -> None:
        for task in self.bar.task_ids:
            self.bar.advance(task)

    def autocast(self) -> AbstractContextManager:
        if self.amp is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.amp)

    def losses(
        self, prompts: dict[str, Tensor], images: Tensor, labels: Tensor, *, precise: bool = False
    ) -> Tensor:
        """The loss of each sample with some prompts swapped for others, [B], to be checked."""
        with nullcontext() if precise else self.autocast():
            run = partial(_run_with, self.model, prompts) if prompts else self.model
            logits = self.labels.logits(run, images)
        return self.labels.losses(logits, labels)

    def check(self, losses: Tensor) -> Tensor:
        """Waits for the losses of the batch at hand and gives them back."""
        found = self.checked_later(self.samples)
        found.add(losses)
        found.look()
        return losses

    def checked_later(self, before: int = 0) -> CheckedLosses:
        """Takes the losses behind the first `before`; looking does not hold the GPU up."""
        return CheckedLosses(f" of process {self.rank}" if self.processes > 1 else "", before)

    def means(self, totals: list[Tensor]) -> Scores:
        """Divides the sums [m_l] of all processes by their samples; sums are float64."""
        sums = torch.cat([*totals, totals[0].new_tensor([self.samples])])
        if self.processes > 1:
            torch.distributed.all_reduce(sums)
        self.total = int(sums[-1])
        if not self.total:
            raise ValueError("loader: it yielded no sample (an iterator can be read only once)")
        if not sums.isfinite().all():
            raise ValueError(
                "model: its gradients overflow in float16; give float32 weights, or amp='bf16'"
            )
        return [s.cpu() for s in (sums[:-1] / self.total).split([len(t) for t in totals])]


class CheckedLosses(Losses):
    """Losses of this process's samples; one that is not finite is an error of the loader's."""

    def __init__(self, of: str, before: int):
        super().__init__(of)
        self.before = before  # samples that this process read earlier

    def error(self, value: float, step: int, row: int, sample: int) -> Exception:
        """Names the sample in the order in which this process reads them."""
        what = "image" if value == OF_INPUT else "loss"
        return ValueError(
            f"loader: the {what} of sample {self.before + sample}{self.where} is not finite"
        )


def _run_with(model: VPT, prompts: dict[str, Tensor], images: Any) -> Any:
    return functional_call(model, prompts, (images,))


def _processes() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed:
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _share(loader: Any, rank: int, processes: int) -> Any:
    """Gives this process every `processes`-th batch; a loader with a sampler reads no others."""
    if processes == 1:
        return loader
    batches = getattr(loader, "batch_sampler", None)
    if is_divided(loader):
        raise ValueError(
            "loader: it is divided among processes already; give the one that reads everything"
        )
    if batches is None or isinstance(loader.dataset, IterableDataset):
        return _Every(loader, rank, processes)
    return rebuilt(loader, loader.dataset, batch_sampler=_Every(batches, rank, processes))


class _Every:
    """Yields every `step`-th of the items from `first` on, each time that it is iterated."""

    def __init__(self, items: Any, first: int, step: int):
        self.items, self.first, self.step = items, first, step

    def __iter__(self) -> Iterator:
        return itertools.islice(self.items, self.first, None, self.step)

    def __len__(self) -> int:
        return len(range(self.first, len(self.items), self.step))
