"""Prompt Condensation: score, select, fine-tune."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from pcx.arguments import real_number, whole_number
from pcx.condensation.scores_file import write_scores
from pcx.condensation.scoring import check_prompted, score
from pcx.condensation.selection import checked_scores, select
from pcx.models.record import Condensation
from pcx.models.vpt.model import VPT
from pcx.tasks.batches import check_loader
from pcx.training.checkpoint import check_place
from pcx.training.evaluation import evaluate, standard_error
from pcx.training.fitting import fit
from pcx.training.objectives import Criterion, Objective, objective_for
from pcx.training.recipe import checked_settings
from pcx.training.run_folder import writable_folder

GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7)


def condense(
    model: VPT,
    loader,
    keep: float | int | str = 0.3,
    *,
    method: str = "taylor",
    scope: str = "global",
    epochs: int = 20,
    lr: float | None = None,
    scores: Sequence[Tensor] | None = None,
    val_loader=None,
    max_drop: float = 0.5,
    opt: str = "momentum",
    weight_decay: float = 1e-3,
    clip_grad: float | None = None,
    criterion: Criterion | None = None,
    objective: str | Objective = "single-label",
    amp: str = "no",
    execution: str = "auto",
    seed: int = 0,
    checkpoint_dir: str | os.PathLike | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> VPT:
    """Prompt Condensation (Algorithm 1): keeps the prompts that matter and fine-tunes them.

    Args:
        model: a trained VPT; not changed. The result shares its backbone.
        loader: the training data, for scoring (read once, plainly) and for fine-tuning.
        keep: a fraction in (0, 1], a count, or "auto": the smallest of `GRID` whose accuracy on
            `val_loader` after fine-tuning lies at most `max_drop` points under the model's own, or
            all prompts where none does.
        method: of scoring, see `pcx.score`.
        scope: "global" ranks all layers together, "local" each layer by itself.
        epochs: of fine-tuning, with dropout off and no warm-up; 0 for none.
        lr: of fine-tuning; None is a tenth of the rate that `fit` recorded in the model.
        scores: scores computed before; None computes them.
        val_loader: validation data; needed by "auto", reported per epoch otherwise.
        max_drop: percentage points, for "auto".
        opt, weight_decay, clip_grad, criterion, objective, amp, execution, seed, progress: as
            `pcx.fit` takes them.
        checkpoint_dir: folder for `scores.json` (scores and kept indices) and for what `pcx.fit`
            writes of the fine-tuning. "auto" has a folder in it for each keep, such as keep_0.3.
        resume: continue the fine-tuning from that folder. The scores are computed again.
        overwrite: replace what the folder has; without either, a fine-tuning in it is an error.

    Returns:
        A new VPT whose `.condensation` tells how it came about.

    Raises:
        ValueError: an argument does not fit, no learning rate is known, "auto" lacks validation
            data, or the folder is of another condensation.
    """
    settings = checked_settings(opt, weight_decay, clip_grad, seed)
    epochs, lr = _checked_rate(model, keep, scope, epochs, lr, val_loader, max_drop)
    check_loader(loader)
    parts = [f"keep_{fraction}" for fraction in GRID]
    check_place(checkpoint_dir, resume=resume, overwrite=overwrite, within=parts)
    folder = None if checkpoint_dir is None else writable_folder(checkpoint_dir)
    chosen = objective_for(objective, criterion)
    shared: dict[str, Any] = {"objective": chosen, "amp": amp, "execution": execution}
    shared |= {"seed": seed, "progress": progress}
    if scores is None:
        scores = score(model, loader, method=method, **shared)
    else:
        method, scores = "given", checked_scores(scores)
    if [len(s) for s in scores] != list(model.counts):
        raise ValueError(f"scores: {[len(s) for s in scores]} per layer, expected {model.counts}")
    options = {**settings, "lr": lr, "epochs": epochs, "val_loader": val_loader, **shared}
    options |= {"resume": resume, "overwrite": overwrite}
    tuning = _Tuning(model, loader, method, scope, list(scores), folder, options)
    if not isinstance(keep, str):
        return tuning.at(keep, folder)
    best = _smallest(tuning, max_drop)
    if folder and best.condensation is not None:
        write_scores(folder, best.condensation)
    return best


def _checked_rate(
    model: Any, keep, scope, epochs, lr, val_loader, max_drop
) -> tuple[int, float | None]:
    """Epochs and learning rate of the fine-tuning, None where there is none.

    Raises:
        ValueError: an argument of `condense` does not fit.
    """
    check_prompted(model)
    epochs = whole_number("epochs", epochs)
    real_number("max_drop", max_drop)
    if lr is not None:
        lr = real_number("lr", lr, above=0, expected="a positive number")
    if epochs and lr is None:
        if model.trained_lr is None:
            raise ValueError(
                "lr: the model records no learning rate (it was not trained by pcx.fit); give lr, "
                "a tenth of the rate that it was trained with"
            )
        lr = 0.1 * model.trained_lr
    if isinstance(keep, str) and keep != "auto":
        raise ValueError(f"keep: {keep!r}, expected a fraction, a count or 'auto'")
    if keep == "auto" and val_loader is None:
        raise ValueError("val_loader: keep='auto' needs validation data")
    if not isinstance(keep, str):
        select([torch.zeros(m) for m in model.counts], keep, scope=scope)
    return epochs, lr


@dataclass(frozen=True)
class _Tuning:
    """The settings that condensing to one share or several has in common."""

    model: VPT
    loader: Any
    method: str
    scope: str
    ranking: list[Tensor]
    folder: Path | None
    options: dict[str, Any]  # of fit

    def at(self, keep: float | int, folder: Path | None, *, tuned: bool = True) -> VPT:
        """The model condensed to a share or count, and fine-tuned where it is asked for."""
        kept = self._selected(keep)
        small = self.model.keep(kept)
        small.set_dropout(0.0)
        found = Condensation(self.method, self.scope, keep, self.ranking, kept)
        small.condensation = found
        if folder:
            write_scores(folder, found, resume=self.options["resume"])
        if tuned and self.options["epochs"]:
            options = {**self.options, "warmup_epochs": 0, "checkpoint_dir": folder}
            found.history = fit(small, self.loader, **options)
        small.trained_lr = self.model.trained_lr
        return small

    def _selected(self, keep: float | int) -> list[Tensor]:
        """The kept indices per layer; layers that share their prompts are ranked by their mean."""
        if not self.model.prompts.tied:
            return select(self.ranking, keep, scope=self.scope)
        used = [row for row in self.ranking if len(row)]
        (kept,) = select([torch.stack(list(used)).mean(0)], keep, scope="local")
        return [kept if len(row) else kept[:0] for row in self.ranking]

    def evaluated(self, model: VPT) -> dict:
        """Evaluates a model on the validation data.

        Raises:
            ValueError: the objective has no accuracy to compare.
        """
        shared = {name: self.options[name] for name in ("objective", "amp", "execution")}
        found = evaluate(model, self.options["val_loader"], **shared)
        if "accuracy" not in found:
            raise ValueError(
                f"keep: 'auto' compares accuracies, and the objective "
                f"{shared['objective'].name!r} has none; give a fraction or a count"
            )
        return found


def _smallest(tuning: _Tuning, max_drop: float) -> VPT:
    """Fine-tunes at every keep of the grid and returns the smallest that holds its accuracy.

    Where none does, that is a copy of the model with all its prompts.
    """
    model, folder = tuning.model, tuning.folder
    whole = tuning.evaluated(model)
    grid = [fraction for fraction in GRID if fraction * sum(model.counts) >= 1]
    candidates = [tuning.at(f, folder and folder / f"keep_{f}") for f in grid]
    curve = [
        _point(fraction, small, tuning.evaluated(small))
        for fraction, small in zip(grid, candidates, strict=True)
    ]
    curve.append(_point(1.0, model, whole))
    floor = whole["accuracy"] - max_drop
    holding = [
        small for small, row in zip(candidates, curve, strict=False) if row["accuracy"] >= floor
    ]
    # Where none holds, the model as it was.
    best: Any = holding[0] if holding else tuning.at(1.0, None, tuned=False)
    best.condensation.curve = curve
    samples = whole["samples"]
    Console(quiet=not tuning.options["progress"]).print(
        f"keep {best.condensation.keep}: the smallest within {max_drop} points of "
        f"{whole['accuracy']:.1f}% "
        f"on {samples} validation images, where one image is {100 / samples:.2f} points and the "
        f"standard error {curve[-1]['standard_error']:.2f}"
    )
    return best


def _point(keep: float, model: VPT, found: dict) -> dict:
    return {
        "keep": keep,
        "prompts": sum(model.counts),
        "accuracy": found["accuracy"],
        "standard_error": standard_error(found),
    }
