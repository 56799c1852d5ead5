"""Prompt Condensation: score, select, fine-tune."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from rich.console import Console
from torch import Tensor

from pcx.condensation.scores_file import write_scores
from pcx.condensation.scoring import score
from pcx.condensation.selection import select
from pcx.models.record import Condensation
from pcx.models.vpt.model import VPT
from pcx.training.evaluation import evaluate, standard_error
from pcx.training.fitting import fit
from pcx.training.objectives import Criterion
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
    amp: str = "no",
    seed: int = 0,
    checkpoint_dir: str | os.PathLike | None = None,
    resume: bool = False,
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
        opt, weight_decay, clip_grad, criterion, amp, seed, progress: as `pcx.fit` takes them.
        checkpoint_dir: folder for `scores.json` (scores and kept indices) and for what `pcx.fit`
            writes of the fine-tuning. "auto" has a folder in it for each keep, such as keep_0.3.
        resume: continue the fine-tuning from that folder. The scores are computed again.

    Returns:
        A new VPT whose `.condensation` tells how it came about.

    Raises:
        ValueError: an argument does not fit, no learning rate is known, "auto" lacks validation
            data, or the folder is of another condensation.
    """
    if epochs < 0:
        raise ValueError(f"epochs: {epochs}, expected 0 or more")
    if resume and checkpoint_dir is None:
        raise ValueError("resume: needs checkpoint_dir")
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
    if not isinstance(keep, str):  # before anything is computed
        select([torch.zeros(m) for m in model.counts], keep, scope=scope)
    folder = None if checkpoint_dir is None else writable_folder(checkpoint_dir)
    ranking: Sequence[Tensor]
    if scores is None:
        ranking = score(
            model,
            loader,
            method=method,
            criterion=criterion,
            amp=amp,
            seed=seed,
            progress=progress,
        )
    else:
        ranking, method = scores, "given"
    if [len(s) for s in ranking] != list(model.counts):
        raise ValueError(f"scores: {[len(s) for s in ranking]} per layer, expected {model.counts}")

    def at(fraction: float | int, epochs: int = epochs) -> VPT:
        kept = select(ranking, fraction, scope=scope)
        small = model.keep(kept)
        small.set_dropout(0.0)
        small.condensation = Condensation(method, scope, fraction, list(ranking), kept)
        own = folder / f"keep_{fraction}" if folder and keep == "auto" else folder
        if own:
            write_scores(own, small.condensation, resume=resume)
        if epochs:
            small.condensation.history = fit(
                small,
                loader,
                epochs=epochs,
                lr=lr,
                val_loader=val_loader,
                warmup_epochs=0,
                opt=opt,
                weight_decay=weight_decay,
                clip_grad=clip_grad,
                criterion=criterion,
                amp=amp,
                seed=seed,
                checkpoint_dir=own,
                resume=resume,
                progress=progress,
            )
        small.trained_lr = model.trained_lr
        return small

    if isinstance(keep, str):
        best = _smallest(model, at, val_loader, max_drop, criterion, amp, progress)
        if folder and best.condensation is not None:
            write_scores(folder, best.condensation)
        return best
    return at(keep)


def _smallest(model: VPT, at, val_loader, max_drop, criterion, amp, progress) -> VPT:
    """Fine-tunes at every keep of the grid and returns the smallest that holds its accuracy.

    Where none does, that is a copy of the model with all its prompts.
    """
    whole = evaluate(model, val_loader, criterion=criterion, amp=amp)
    total = sum(model.counts)
    grid = [fraction for fraction in GRID if fraction * total >= 1]
    candidates = [at(fraction) for fraction in grid]
    curve = [
        _point(fraction, small, evaluate(small, val_loader, criterion=criterion, amp=amp))
        for fraction, small in zip(grid, candidates, strict=True)
    ]
    curve.append(_point(1.0, model, whole))
    floor = whole["accuracy"] - max_drop
    holding = [
        small for small, row in zip(candidates, curve, strict=False) if row["accuracy"] >= floor
    ]
    best = holding[0] if holding else at(1.0, epochs=0)  # the model as it was
    best.condensation.curve = curve
    samples = whole["samples"]
    Console(quiet=not progress).print(
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
