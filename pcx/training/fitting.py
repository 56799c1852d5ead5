"""Training of what is trainable in a model: prompts and head."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from rich.console import Console
from torch import Tensor, nn

from pcx.backbones.spec import check_unwrapped
from pcx.checkpoints.fingerprint import fingerprint
from pcx.models.base import check_choice, check_module, state_of
from pcx.models.heads import trained_dtype
from pcx.models.peft_model import known_by
from pcx.tasks.batches import check_loader
from pcx.training.callbacks import Callback, check_callbacks, checked_metric
from pcx.training.checkpoint import (
    LAST,
    check_place,
)
from pcx.training.class_names import keep_names
from pcx.training.display import Display, say_facts
from pcx.training.evaluation import accelerator_for
from pcx.training.objectives import Criterion, Objective, objective_for
from pcx.training.recipe import (
    Recipe,
    checked_settings,
    rates_of,
)
from pcx.training.run import Run
from pcx.training.run_folder import RunFolder
from pcx.training.token_cache import CACHES


def fit(
    model: nn.Module,
    loader,
    *,
    epochs: int,
    lr: float | None = None,
    base_lr: float | None = None,
    val_loader=None,
    weight_decay: float = 1e-3,
    momentum: float = 0.9,
    opt: str = "momentum",
    warmup_epochs: float | None = None,
    clip_grad: float | None = None,
    criterion: Criterion | None = None,
    objective: str | Objective = "single-label",
    amp: str = "no",
    execution: str = "auto",
    cache: str | None = None,
    accumulate: int = 1,
    ema: float | None = None,
    best: str | None = None,
    callbacks: Callback | Sequence[Callback] = (),
    seed: int = 0,
    checkpoint_dir: str | os.PathLike | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> list[dict]:
    """Trains what a method adds to a backbone, as the VPT paper does (Appendix, Table 6).

    SGD with momentum, weight decay on prompts and head weight but not on its bias, linear warm-up,
    then cosine to zero, cross-entropy. The schedule moves with every update.

    Args:
        model: a tuned model, or any module some of whose parameters require gradients.
        loader: yields (images [B, 3, H, W], labels), or dicts of "pixel_values" and "labels".
        epochs, val_loader: passes over the loader; what is evaluated after each.
        lr, base_lr: the learning rate itself, or one that is scaled by batch / 256 as in the paper.
        weight_decay, momentum, opt: as timm's factory takes them ("sgd" is Nesterov's form).
        warmup_epochs, clip_grad: a tenth of the epochs by default; largest gradient norm.
        criterion: (logits, labels) -> one loss per sample [B]; the objective's own by default.
        objective: a name in `pcx.training.OBJECTIVES`, or an `Objective`: what labels look like.
        amp: "no", "bf16" or "fp16".
        execution: "auto" replays a step from a CUDA graph where it can be recorded, to the bits of
            "eager"; "cuda-graph" does or raises; "compile" compiles the model too.
        cache: "tokens" computes what the first block is given once for each image, and trains from
            that: for transforms without random parts, and what fits in memory.
        accumulate: batches whose mean gradient makes an update.
        ema: decay of a moving average of the weights, validated and kept in the end; None for none.
        best: a column of the history, such as "val_accuracy" (of "...loss" and "...error" the
            lowest): the model ends with the weights of the epoch where it is best.
        callbacks: of `pcx.training.callbacks`, such as EarlyStopping(patience=10).
        seed: of Python's, NumPy's and torch's generators, which each epoch seeds anew.
        checkpoint_dir: folder for `last.pt`, written whole after every epoch, and the run's files.
        resume, overwrite, progress: continue from last.pt, or replace it; show how it goes.

    Returns:
        One dict per epoch: epoch, loss, accuracy (percent, or the objective's metrics), samples,
        lr, loader_share (0..1: how much of it waited for the loader), seconds, and with a
        val_loader val_loss, val_accuracy. The model stays in training mode.

    Raises:
        ValueError: an argument or a batch does not fit, or the checkpoint is another run's.
        NonFiniteLoss: the loss became NaN or infinite, by which image where one is. The model is
            back at the start of that epoch, and the last checkpoint stays.
    """
    called = _checked(model, loader, val_loader, cache, best, callbacks)
    check_place(checkpoint_dir, resume=resume, overwrite=overwrite)
    names, chosen = _trainable(model), objective_for(objective, criterion)
    given = checked_settings(opt, weight_decay, clip_grad, seed, momentum, ema)
    with accelerator_for(amp, seed) as accelerator:
        rates = rates_of(epochs, lr, base_lr, warmup_epochs, loader, accelerator, accumulate)
        given |= {"amp": amp, "criterion": chosen.described, **rates}
        recipe = Recipe(**given, frozen=_frozen(model, names, checkpoint_dir))
        folder = None if checkpoint_dir is None else RunFolder(checkpoint_dir)
        console = Console(quiet=not (progress and accelerator.is_main_process))
        say_facts(console, model, names, recipe, accelerator.device)
        data, how = (loader, val_loader), (chosen, execution, cache, best)
        with Run(accelerator, model, names, recipe, data, *how) as run:
            return _train(run, folder, resume, console, called)


def _checked(
    model: Any, loader: Any, val_loader: Any, cache: str | None, best: str | None, callbacks: Any
) -> list[Callback]:
    """The callbacks; a ValueError where arguments do not fit, before anything is read."""
    check_module("model", model)
    check_unwrapped(model, "model", "give execution='compile', or run several processes")
    if not torch.is_grad_enabled():
        raise ValueError(
            "model: gradients are turned off here (torch.no_grad or inference_mode); call fit "
            "outside of that"
        )
    check_loader(loader)
    if val_loader is not None:
        check_loader(val_loader, "val_loader")
    check_choice("cache", cache, CACHES)
    if best is not None:
        checked_metric("best", best)
    if val_loader is None and best is not None and best.startswith("val_"):
        raise ValueError(f"best: {best!r} needs a val_loader; give one, or best='loss'")
    return check_callbacks(callbacks)


def _train(
    run: Run, folder: RunFolder | None, resume: bool, console: Console, called: list[Callback]
) -> list[dict]:
    file = None if folder is None else folder.path / LAST
    if resume and file is not None and file.exists():
        run.restore(file)
        console.print(f"resumed {file} after epoch {len(run.history)}", markup=False)
    if not run.accelerator.is_main_process:
        folder = None
    config = {"recipe": asdict(run.recipe), **run.facts}
    if folder is not None:
        folder.start(config, str(run.accelerator.device), run.history)
    with ExitStack() as started:
        for each in called:
            started.callback(each.on_exit)
            each.on_start(config, run.history)
        _epochs(run, folder, console, called)
        for each in called:
            each.on_end(run.history)
    known = known_by(run.model)
    if known is not None:
        known.record.set_recipe({**config["recipe"], "objective": run.objective.name})
        keep_names(known, run.classes)
    return run.history


def _epochs(run: Run, folder: RunFolder | None, console: Console, called: list[Callback]) -> None:
    """The epochs that a run still has, up to the weights that the training is for."""
    epochs = run.recipe.epochs
    with Display(console, epochs, len(run.loader)).shown(len(run.history)) as display:

        def on_step(epoch: int, step: int, losses: Tensor) -> None:
            display.step(epoch, step)
            for each in called:
                each.on_step(epoch, step, losses)

        run.on_step = on_step
        stopped = bool(run.history) and _ends(run, called)
        while len(run.history) < epochs and not stopped:
            row = run.epoch()
            if folder is not None:
                run.save(folder.path / LAST)
                folder.add_epoch(run.history)
            display.epoch(row)
            stopped = _ends(run, called)
    run.finish()
    _say_end(run, console, stopped)


def _ends(run: Run, called: list[Callback]) -> bool:
    """Calls the callbacks behind an epoch; whether the first process's end the training."""
    with run.averaged():
        asked = [each.on_epoch(run.history) for each in called]
    return broadcast_object_list([any(asked)])[0]


def _say_end(run: Run, console: Console, stopped: bool) -> None:
    if stopped and len(run.history) < run.recipe.epochs:
        console.print(f"stopped after epoch {len(run.history)}")
    if run.best is not None:
        console.print(f"the weights are those of epoch {run.best.epoch}, by {run.best.metric}")


def _trainable(model: nn.Module) -> list[str]:
    state_of(model)  # a tuned model takes what requires gradients out of shared memory
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not names:
        raise ValueError("model: no parameter requires a gradient (no prompts and no head?)")
    parameters = dict(model.named_parameters())
    narrow = [n for n in names if trained_dtype(parameters[n].dtype) != parameters[n].dtype]
    if narrow:
        warnings.warn(
            f"model: {len(narrow)} trained tensors, such as {narrow[0]}, are "
            f"{str(parameters[narrow[0]].dtype).removeprefix('torch.')}, which rounds small "
            "updates away; build the model on a float32 backbone and give amp='bf16'",
            stacklevel=3,
        )
    return names


def _frozen(model: nn.Module, names: list[str], checkpoint_dir: Any) -> str | None:
    """The fingerprint of what is not trained, of a run that writes checkpoints."""
    if checkpoint_dir is None:
        return None
    return fingerprint((n, p) for n, p in model.named_parameters() if n not in names)
