"""Grids of the settings that are chosen on val, and each method's default."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pcx.arguments import real_number
from pcx.training.recipe import checked_settings


class Cell(NamedTuple):
    """One choice of a grid's settings, as `pcx.fit` takes them."""

    lr: float
    weight_decay: float
    clip_grad: float | None
    opt: str

    def __str__(self) -> str:
        clip = "not clipped" if self.clip_grad is None else f"clipped to {self.clip_grad:g}"
        return f"lr {self.lr:g}, decay {self.weight_decay:g}, {clip}, {self.opt}"


@dataclass(frozen=True)
class Grid:
    """Learning rates, weight decays and norms to clip to, every combination of which is a cell.

    Args:
        lr: learning rates.
        weight_decay: as `pcx.fit` takes it.
        clip_grad: largest norms of the gradient; None does not clip.
        opt: the optimiser, of all cells.
        scaled: whether rates are multiplied by batch / 256, as the VPT paper's are.

    Raises:
        ValueError: a list is empty or has a value twice, or a value is out of range.
    """

    lr: tuple[float, ...]
    weight_decay: tuple[float, ...] = (1e-4, 1e-2)
    clip_grad: tuple[float | None, ...] = (None,)
    opt: str = "momentum"
    scaled: bool = False

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "clip_grad"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}: {list(values)}, expected some values, and none twice")
        for lr in self.lr:
            real_number("lr", lr, above=0, expected="a positive number")
        for decay, clip in itertools.product(self.weight_decay, self.clip_grad):
            checked_settings(self.opt, decay, clip, seed=0)

    def cells(self, batch_size: int) -> tuple[Cell, ...]:
        """The cells in their fixed order: by rate, then by decay, then by clipping."""
        factor = batch_size / 256 if self.scaled else 1.0
        return tuple(
            Cell(float(lr * factor), float(decay), clip, self.opt)
            for lr, decay, clip in itertools.product(self.lr, self.weight_decay, self.clip_grad)
        )


# The VPT paper (Table 6) searches ten base rates from 0.05 to 50 by SGD, its code up to 1000 for
# VPT-Shallow. These are five of the ten, one below and one above. Clipping is not the paper's; it
# tames the highest rates.
VPT_SGD = Grid((0.005, 0.05, 0.25, 1.0, 5.0, 50.0, 500.0), clip_grad=(None, 1.0), scaled=True)
# The VPT paper (Table 6) searches base rates from 1e-4 to 5e-3 by AdamW, and decays from 0 to 0.01.
# The two rates above are ours: a small backbone's best lie there.
VPT_ADAMW = Grid((1e-4, 5e-4, 1e-3, 5e-3, 2e-2, 1e-1), opt="adamw", scaled=True)
# Rates themselves. The SCT paper (Table 2) searches base rates from 1e-4 to 0.5; its code's rates
# for VTAB-1k lie between 7e-4 and 0.075, their median at 6e-3. LoRA and adapters are commonly
# trained at 1e-3 to 1e-2. The VPT paper's rates for its adapters, up to 1.25e-3 at a batch of 64,
# are below what they can do. At 0.1 other seeds than the one that chose it fell apart.
SMALL_ADAMW = Grid((1e-4, 1e-3, 3e-3, 1e-2, 3e-2), opt="adamw")

# The default grid of each method, by its name in `pcx.METHODS`.
GRIDS: dict[str, Grid] = {
    "vpt": VPT_SGD,
    "linear": VPT_SGD,
    "mlp": VPT_SGD,
    "sidetune": VPT_SGD,
    "border": VPT_SGD,
    "full": VPT_ADAMW,
    "partial": VPT_ADAMW,
    "bias": SMALL_ADAMW,
    "adapter": SMALL_ADAMW,
    "sct": SMALL_ADAMW,
    "peft": SMALL_ADAMW,
}


class Changes(NamedTuple):
    """What a user sets in every method's grid; None leaves the method's own."""

    lr: Sequence[float] | None = None
    weight_decay: Sequence[float] | None = None
    clip_grad: Sequence[float | None] | None = None
    opt: str | None = None


def grid_of(name: str, changes: Changes = Changes()) -> Grid:  # noqa: B008 (it cannot change)
    """The grid of a method: its default, or that of small modules, with a user's changes.

    Args:
        name: of the method.
        changes: rates among them are rates themselves, whatever the batch.
    """
    return changed(GRIDS.get(name, SMALL_ADAMW), changes)


def changed(grid: Grid, changes: Changes) -> Grid:
    """A grid with a user's changes, whose rates are rates themselves."""
    given: dict[str, Any] = {
        field: tuple(value) if isinstance(value, Sequence) and field != "opt" else value
        for field, value in changes._asdict().items()
        if value is not None
    }
    scaled = grid.scaled and changes.lr is None
    return Grid(**{**_fields(grid), **given, "scaled": scaled})


def _fields(grid: Grid) -> dict[str, Any]:
    return {field: getattr(grid, field) for field in grid.__dataclass_fields__}
