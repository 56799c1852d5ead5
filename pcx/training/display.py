"""What a training run says while it goes: its facts, and a bar or a line for each epoch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from pcx.backbones.inputs import data_config
from pcx.models.base import TunedModel
from pcx.training.recipe import Recipe


def say_facts(
    console: Console, model: nn.Module, names: Sequence[str], recipe: Recipe, device: object
) -> None:
    """Prints what is trained at which rate, and what images the backbone expects."""
    parameters = dict(model.named_parameters())
    trained = sum(parameters[n].numel() for n in names)
    total = sum(p.numel() for p in parameters.values())
    console.print(
        f"training {trained:,} of {total:,} parameters ({100 * trained / total:.2f}%), "
        f"lr {recipe.lr:g}, {recipe.epochs} epochs, on {device}"
    )
    widths = {str(p.dtype).removeprefix("torch.") for p in parameters.values()}
    own = {str(parameters[n].dtype).removeprefix("torch.") for n in names}
    if own != widths:
        console.print(f"trained in {', '.join(sorted(own))} over {', '.join(sorted(widths - own))}")
    if not isinstance(model, TunedModel):
        return
    config = data_config(model)
    console.print(
        f"the backbone expects images of {'x'.join(map(str, config['input_size']))} normalised by "
        f"mean {tuple(config['mean'])} and std {tuple(config['std'])}"
    )


class Display:
    """Shows how a training goes: a bar on a terminal, elsewhere a plain line for each epoch.

    Within a long epoch it says each minute how far it is.

    Args:
        console: where it is shown.
        epochs: of the whole training.
        batches: of an epoch, None where that is not known.
    """

    SILENCE = 60.0  # seconds after which something is said

    def __init__(self, console: Console, epochs: int, batches: int | None = None):
        self.console, self.epochs, self.batches = console, epochs, batches
        self.bar: Progress | None = None
        self.task: Any = None
        self.said = time.monotonic()

    @contextmanager
    def shown(self, done: int) -> Iterator[Display]:
        """Shows it, from so many epochs on."""
        self.said = time.monotonic()
        if not self.console.is_terminal or self.console.quiet:
            yield self
            return
        with _bar(self.console) as self.bar:
            self.task = self.bar.add_task("training", total=self.epochs, completed=done, note="")
            yield self

    def step(self, epoch: int, step: int) -> None:
        """Says how far an epoch is, where nothing has been said for long."""
        now = time.monotonic()
        if now - self.said < self.SILENCE:
            return
        self.said = now
        said = f"batch {step}" + (f" of {self.batches}" if self.batches else "")
        if self.bar is not None:
            self.bar.update(self.task, note=said)
        else:
            self.console.print(f"epoch {epoch}/{self.epochs}: {said}", soft_wrap=True)

    def epoch(self, row: dict) -> None:
        """Shows an epoch that is over."""
        self.said = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, advance=1, note=note_of(row))
        else:
            self.console.print(
                f"epoch {row['epoch']}/{self.epochs}: {note_of(row)}",
                soft_wrap=True,
                highlight=False,
            )


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def note_of(row: dict) -> str:
    """The loss and the first metric of an epoch, of its validation, and what limits the run."""
    metric = list(row)[2]  # behind epoch and loss
    note = f"loss {row['loss']:.3f}  {metric} {row[metric]:.1f}"
    if f"val_{metric}" in row:
        note += f"  validation {row[f'val_{metric}']:.1f}"
    return f"{note}  {limit_of(row)}" if "loader_share" in row else note


def limit_of(row: dict) -> str:
    """The share of an epoch's training pass that waited for the loader, and whether it limits."""
    share = row["loader_share"]
    return f"limited by the loader ({share:.0%})" if share > 0.5 else f"loader {share:.0%}"
