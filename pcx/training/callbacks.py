"""What a training run says while it goes: its facts, a bar, and a note for each epoch."""

from __future__ import annotations

from collections.abc import Sequence

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


def bar_of(console: Console) -> Progress:
    """A bar over epochs, with a note behind it."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=console.quiet,
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
