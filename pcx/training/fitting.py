"""Training of what is trainable in a model: prompts and head."""

from __future__ import annotations

import os
import random
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from pcx.checkpoints.fingerprint import fingerprint
from pcx.checkpoints.torch_file import write_torch
from pcx.models.base import TunedModel, check_choice, check_module, copy_state, state_of
from pcx.models.heads import trained_dtype
from pcx.models.peft_model import known_by
from pcx.training.batches import BatchCheck, LoaderWait, check_loader, placed
from pcx.training.callbacks import bar_of, note_of, say_facts
from pcx.training.checkpoint import (
    LAST,
    VERSION,
    check_place,
    check_same_run,
    description_of,
    read_checkpoint,
)
from pcx.training.class_names import agreed_names, keep_names
from pcx.training.evaluation import Evaluation, accelerator_for, divided, gathered
from pcx.training.execution import check_execution, compiled, prepared
from pcx.training.loaders import set_epoch, start_workers_anew
from pcx.training.losses import Losses, NonFiniteInput, NonFiniteLoss, seen_losses
from pcx.training.objectives import Criterion, Objective, objective_for
from pcx.training.optimizers import Rates, load_plain, make_recordable, plain_state
from pcx.training.processes import Together
from pcx.training.recipe import (
    Recipe,
    check_recipe,
    checked_settings,
    cosine_schedule,
    rates_of,
)
from pcx.training.run_folder import RunFolder, facts_of
from pcx.training.token_cache import CACHES, FromTokens, cached_tokens

BACK = "The model is back at the start of the epoch"


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
    seed: int = 0,
    checkpoint_dir: str | os.PathLike | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> list[dict]:
    """Trains what a method adds to a backbone, as the VPT paper does (Appendix, Table 6).

    SGD with momentum, weight decay on prompts and head weight but not on the head's bias, linear
    warm-up, then cosine to zero, cross-entropy. The schedule moves with every update.

    Args:
        model: a tuned model, or any module some of whose parameters require gradients.
        loader: yields (images [B, 3, H, W], labels), or dicts of "pixel_values" and "labels", and
            has a length; images fit the backbone.
        epochs: passes over the loader.
        lr, base_lr: the learning rate itself, or one that is scaled by batch / 256 as in the paper.
        val_loader: evaluated after each epoch.
        weight_decay, momentum, opt: as timm's factory takes them ("sgd" is Nesterov's form).
        warmup_epochs: a tenth of the epochs by default (the paper's 10 of 100).
        clip_grad: largest gradient norm, None for no clipping.
        criterion: (logits, labels) -> one loss per sample [B]; the objective's own by default.
        objective: a name in `pcx.training.OBJECTIVES`, or an `Objective`: what labels look like.
        amp: "no", "bf16" or "fp16".
        execution: "auto" records a step in a CUDA graph where that is possible and replays it, to
            the bits of "eager". Replayed steps run no Python of criterion or model. "cuda-graph"
            makes it an error where it is not possible; "compile" compiles the model too.
        cache: "tokens" computes what the first block is given once for each image and trains from
            that, without images: for transforms without random parts, and what fits in memory.
        seed: of Python's, NumPy's and torch's generators, which each epoch seeds anew.
        checkpoint_dir: folder for `last.pt`, written whole or not at all after every epoch, and
            for the run's config.json, environment.json and history.csv. Persistent workers then
            start anew with each epoch, so that a resumed run draws as an undisturbed one.
        resume, overwrite, progress: continue from last.pt, where it exists, or replace it (without
            either an existing one is an error); show a bar and the run's facts.

    Returns:
        One dict per epoch: epoch, loss, accuracy (percent, or the objective's metrics), samples,
        lr, loader_share (0..1: how much of the pass waited for the loader), seconds, and with
        a val_loader val_loss, val_accuracy. The model stays in training mode.

    Raises:
        ValueError: an argument or a batch does not fit, or the checkpoint is another run's.
        NonFiniteLoss: the loss became NaN or infinite, of which the message names the image where
            one is. The model is back at the start of that epoch, and the last checkpoint stays.
    """
    _check(model, loader, val_loader, cache)
    check_place(checkpoint_dir, resume=resume, overwrite=overwrite)
    names, chosen = _trainable(model), objective_for(objective, criterion)
    given = checked_settings(opt, weight_decay, clip_grad, seed, momentum)
    given |= {"amp": amp, "criterion": chosen.described}
    with accelerator_for(amp, seed) as accelerator:
        rates = rates_of(epochs, lr, base_lr, warmup_epochs, loader, accelerator)
        recipe = Recipe(**rates, **given, frozen=_frozen(model, names, checkpoint_dir))
        check_recipe(recipe)
        folder = None if checkpoint_dir is None else RunFolder(checkpoint_dir)
        console = Console(quiet=not (progress and accelerator.is_main_process))
        shared, data = (accelerator, model, names, recipe), (loader, val_loader)
        say_facts(console, *shared[1:], accelerator.device)
        with _Run(*shared, data, chosen, execution, cache) as run:
            return _train(run, folder, resume, console)


def _check(model: Any, loader: Any, val_loader: Any, cache: str | None) -> None:
    """Raises a ValueError where arguments do not fit, before anything is moved or read."""
    check_module("model", model)
    check_loader(loader)
    if val_loader is not None:
        check_loader(val_loader, "val_loader")
    check_choice("cache", cache, CACHES)


def _train(run: _Run, folder: RunFolder | None, resume: bool, console: Console) -> list[dict]:
    epochs = run.recipe.epochs
    file = None if folder is None else folder.path / LAST
    if resume and file is not None and file.exists():
        run.restore(file)
        console.print(f"resumed {file} after epoch {len(run.history)}")
    if not run.accelerator.is_main_process:
        folder = file = None
    if folder is not None:
        config = {"recipe": asdict(run.recipe), **run.facts}
        folder.start(config, str(run.accelerator.device), run.history)
    with bar_of(console) as bar:
        task = bar.add_task("training", total=epochs, completed=len(run.history), note="")
        while len(run.history) < epochs:
            row = run.epoch()
            if folder is not None and file is not None:
                run.save(file)
                folder.add_epoch(run.history)
            bar.update(task, advance=1, note=note_of(row))
    known = known_by(run.model)
    if known is not None:
        known.record.set_recipe(asdict(run.recipe))
        keep_names(known, run.classes)
    return run.history


class _Run:
    """The state of one training run between epochs."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        names: list[str],
        recipe: Recipe,
        data: tuple[Any, Any],  # to train on, and to evaluate on or None
        objective: Objective,
        execution: str,
        cache: str | None,
    ):
        device, (loader, val_loader) = accelerator.device, data
        check_execution(execution, device)
        self.accelerator = accelerator
        self.model = model.to(device)
        self.names = names
        self.recipe = recipe
        self.objective = objective
        self.classes = agreed_names(model, loader, val_loader)
        self.facts = facts_of(model, names, loader, val_loader)
        self.generators = _generators(loader)
        parameters = dict(model.named_parameters())
        self.parameters = {name: parameters[name] for name in names}
        trained: Any = model
        if isinstance(model, TunedModel):
            trained = model.param_groups(recipe.weight_decay)
        plain = create_optimizer_v2(
            trained,
            opt=recipe.opt,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            momentum=recipe.momentum,
        )
        self.recordable = device.type == "cuda" and make_recordable(plain)
        self.rates = Rates(plain, device, self.recordable)
        self.scheduler = cosine_schedule(plain, recipe)
        self.optimizer = accelerator.prepare(plain)
        self.from_tokens: FromTokens | None = None
        if cache is not None:
            self.from_tokens, loader = cached_tokens(self.model, loader, accelerator)
        self.loader = divided(accelerator, loader)
        self.val_loader = None if val_loader is None else divided(accelerator, val_loader)
        self.together = Together(accelerator.num_processes, model, self.parameters.values())
        self.check = BatchCheck(objective, model, self.classes)
        self.called = compiled(self.from_tokens or self.model, execution)
        # What other processes or the optimiser do in between cannot be recorded.
        self.whole = self.recordable and accelerator.num_processes == 1
        self.step: Any = prepared(
            lambda: self._whole_step if self.whole else self._gradients, device, execution
        )
        self.evaluation = Evaluation(accelerator, model, objective, execution, self.classes)
        self.history: list[dict] = []
        self.updates = 0

    def __enter__(self) -> _Run:
        if self.from_tokens is not None:
            self.from_tokens.attach()
        return self

    def __exit__(self, *error: Any) -> None:
        """Gives back what recordings hold, the last gradients with them."""
        self.optimizer.zero_grad()
        self.step = None
        self.evaluation.release()
        if self.from_tokens is not None:
            self.from_tokens.remove()

    def epoch(self) -> dict:
        start, number = time.perf_counter(), len(self.history)
        good = {k: v.detach().clone() for k, v in state_of(self.model).items()}
        _seed_everything(self.recipe.seed, number, self.accelerator.process_index)
        if self.recipe.frozen is not None:
            start_workers_anew(self.loader)
        set_epoch(self.loader, number)
        self.model.train()
        try:
            row = {"epoch": number + 1, **self._pass(number)}
            self._check_parameters(number)
            if self.val_loader is not None:
                found = self._validated()
                del found["samples"]
                row |= {"val_loss": found.pop("loss"), **{f"val_{k}": v for k, v in found.items()}}
        except NonFiniteLoss:
            copy_state(good, state_of(self.model))
            raise
        row["seconds"] = time.perf_counter() - start
        self.history.append(row)
        return row

    def _validated(self) -> dict:
        try:
            return self.evaluation.of(self.val_loader)
        except (ValueError, NonFiniteLoss) as error:
            if not str(error).startswith("loader:"):
                raise
            raise type(error)(f"val_{error}") from error  # the argument's name here

    def _check_parameters(self, number: int) -> None:
        for name, parameter in self.parameters.items():
            if not parameter.isfinite().all():
                raise NonFiniteLoss(
                    f"{name}: no longer finite after epoch {number + 1}: {self._advice()}"
                )

    def _advice(self) -> str:
        lr = self.recipe.lr
        return f"lower lr (now {lr:g}; try {lr / 10:g}), or set clip_grad=1.0. {BACK}"

    def _pass(self, number: int) -> dict:
        metrics, losses, rate = self.objective.metrics(), Losses(f"epoch {number + 1}"), 0.0
        start, wait, device = time.perf_counter(), LoaderWait(), self.accelerator.device
        try:
            for images, labels in placed(self.loader, device, self.check, wait):
                self.scheduler.step_update(self.updates)
                rate = self.rates.hand_over()
                found, *seen = self.step(images, labels)
                if not self.whole:
                    *seen, gradients = seen
                    self._update(gradients)
                self.updates += 1
                found, *rows = gathered(self.accelerator, found, *seen)
                metrics.update(*rows)
                losses.add(found)
            loss = losses.mean()
        except NonFiniteLoss as error:
            if isinstance(error, NonFiniteInput):
                raise NonFiniteInput(f"{error}. {BACK}") from None
            raise NonFiniteLoss(f"loss: {error}: {self._advice()}") from None
        # The mean loss has waited for the device.
        share = {"loader_share": wait.seconds / (time.perf_counter() - start)}
        return {"loss": loss, **metrics.compute(), "samples": losses.samples, "lr": rate, **share}

    def _whole_step(self, images: Any, labels: Tensor) -> tuple[Tensor, ...]:
        """One update; gives the losses [B] and what the metrics need."""
        *found, gradients = self._gradients(images, labels)
        self._update(gradients)
        return tuple(found)

    def _gradients(self, images: Any, labels: Tensor) -> tuple[Any, ...]:
        """Forward, loss, backward; gives the losses [B], what the metrics need, and gradients."""
        with self.accelerator.autocast():
            logits = self.check.logits(self.called, images)
        losses = self.check.losses(logits, labels)
        self.optimizer.zero_grad()
        self.accelerator.backward(losses.mean())
        gradients = [parameter.grad for parameter in self.parameters.values()]
        return seen_losses(losses, images), *self.objective.observed(logits, labels), gradients

    def _update(self, gradients: list[Tensor | None]) -> None:
        for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
            parameter.grad = gradient  # a recorded step writes to gradients of its own
        self.together.average_gradients()
        if self.recipe.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.parameters.values(), self.recipe.clip_grad)
        self.optimizer.step()

    def _buffers(self) -> dict[str, Tensor]:
        parameters = {id(p) for p in self.model.parameters()}
        return {n: t for n, t in state_of(self.model).items() if id(t) not in parameters}

    def save(self, file: Path) -> None:
        """Writes the whole state beside the old file, then puts it in its place."""
        state = {
            "pcx_fit": VERSION,
            "recipe": asdict(self.recipe),
            "model": description_of(self.model),
            "parameters": {k: v.detach().cpu() for k, v in self.parameters.items()},
            "buffers": {k: v.detach().cpu() for k, v in self._buffers().items()},
            "optimizer": plain_state(self.optimizer),
            "history": self.history,
            "updates": self.updates,
            "generators": [g.get_state() for g in self.generators],
        }
        write_torch(state, file)

    def restore(self, file: Path) -> None:
        state = read_checkpoint(file)
        check_same_run(file, state, asdict(self.recipe), self.model, self.parameters)
        copy_state(state["parameters"], self.parameters)
        copy_state(state.get("buffers", {}), self._buffers())
        load_plain(self.optimizer, state["optimizer"])
        for generator, saved in zip(self.generators, state["generators"], strict=True):
            generator.set_state(saved)
        self.history, self.updates = state["history"], state["updates"]


def _generators(loader) -> list[torch.Generator]:
    """The loader's own random generators, whose states belong to a checkpoint."""
    batches = getattr(loader, "batch_sampler", None)
    holders = [loader, getattr(loader, "sampler", None), getattr(batches, "sampler", None)]
    found = [getattr(holder, "generator", None) for holder in holders]
    return [g for i, g in enumerate(found) if isinstance(g, torch.Generator) and g not in found[:i]]


def _seed_everything(seed: int, epoch: int, process: int) -> None:
    mixed = np.random.SeedSequence([seed, epoch, process]).generate_state(1)[0]
    random.seed(int(mixed))
    np.random.seed(int(mixed))
    torch.manual_seed(int(mixed))


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
