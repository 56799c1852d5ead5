"""Training of what is trainable in a model: prompts and head."""

from __future__ import annotations

import os
import random
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pcx.backbones.inputs import data_config
from pcx.backbones.outputs import logits_of
from pcx.checkpoints.files import written_whole
from pcx.checkpoints.fingerprint import fingerprint
from pcx.models.base import TunedModel, copy_state, state_of
from pcx.training.batches import images_and_labels
from pcx.training.evaluation import accelerator_for, evaluate_on, gathered
from pcx.training.objectives import Criterion, criterion_name, per_sample_loss
from pcx.training.recipe import (
    Recipe,
    check_recipe,
    cosine_schedule,
    learning_rate_of,
    positive_count,
    updates_per_epoch_of,
)
from pcx.training.run_folder import RunFolder, facts_of

CHECK_EVERY = 10  # steps between looks at the loss: a look at every step would stall a GPU
LAST = "last.pt"
VERSION = 2  # of that file


class NonFiniteLoss(FloatingPointError):
    """The loss became NaN or infinite."""


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
    amp: str = "no",
    seed: int = 0,
    checkpoint_dir: str | os.PathLike | None = None,
    resume: bool = False,
    progress: bool = True,
) -> list[dict]:
    """Trains prompts and head as the VPT paper does (Appendix, Table 6).

    SGD with momentum, weight decay on prompts and head weight but not on the head's bias, linear
    warm-up, then cosine to zero, cross-entropy. The schedule moves with every update.

    Args:
        model: a `pcx.VPT`, or any module some of whose parameters require gradients.
        loader: yields (images [B, 3, H, W] as the backbone expects them, labels [B] integers), or
            dicts of "pixel_values" and "labels"; it has a length. With persistent workers, random
            transforms that draw from NumPy or Python go on from where the workers stand, which a
            resumed run cannot repeat.
        epochs: passes over the loader.
        lr: the learning rate itself.
        base_lr: instead of lr, scaled by batch / 256 as in the paper.
        val_loader: evaluated after each epoch.
        weight_decay, momentum, opt: as timm's optimiser factory takes them; its "momentum" is plain
            SGD with momentum, its "sgd" Nesterov's.
        warmup_epochs: a tenth of the epochs by default (the paper's 10 of 100).
        clip_grad: largest gradient norm, None for no clipping.
        criterion: (logits, labels) -> one loss per sample [B]; cross-entropy by default.
        amp: "no", "bf16" or "fp16".
        seed: Python's, NumPy's and torch's generators are seeded from it before each epoch, so
            that a resumed run continues as the whole one would have gone.
        checkpoint_dir: folder for `last.pt`, written whole or not at all after every epoch, and
            for the run's config.json, environment.json and history.csv.
        resume: continue from last.pt, where it exists.
        progress: show a bar and the run's facts.

    Returns:
        One dict per epoch (the model stays in training mode): epoch, loss, accuracy (percent),
        samples, lr, seconds, and val_loss, val_accuracy where there is a val_loader.

    Raises:
        ValueError: an argument does not fit, checkpoint_dir cannot be written to, or the
            checkpoint is of another run.
        NonFiniteLoss: the loss became NaN or infinite; the model is back at the start of that epoch
            and the last checkpoint stays.
    """
    names = _trainable(model)
    if resume and checkpoint_dir is None:
        raise ValueError("resume: needs checkpoint_dir")
    with accelerator_for(amp, seed) as accelerator:
        recipe = Recipe(
            epochs=positive_count("epochs", epochs),
            lr=learning_rate_of(lr, base_lr, loader, accelerator),
            weight_decay=weight_decay,
            momentum=momentum,
            opt=opt,
            warmup_epochs=epochs / 10 if warmup_epochs is None else warmup_epochs,
            clip_grad=clip_grad,
            amp=amp,
            seed=seed,
            updates_per_epoch=updates_per_epoch_of(loader, accelerator),
            criterion=criterion_name(criterion),
            frozen=None if checkpoint_dir is None else _frozen(model, names),
        )
        check_recipe(recipe)
        folder = None if checkpoint_dir is None else RunFolder(checkpoint_dir)
        console = Console(quiet=not (progress and accelerator.is_main_process))
        _say_facts(console, model, names, recipe, accelerator)
        run = _Run(accelerator, model, names, recipe, loader, val_loader, criterion)
        history = _train(run, folder, resume, console)
    if isinstance(model, TunedModel):
        model.record.trained_lr = recipe.lr
        model.record.recipe = {k: v for k, v in asdict(recipe).items() if k != "frozen"}
    return history


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
    with _bar(console) as bar:
        task = bar.add_task("training", total=epochs, completed=len(run.history), note="")
        while len(run.history) < epochs:
            row = run.epoch()
            if folder is not None and file is not None:
                run.save(file)
                folder.add_epoch(run.history)
            bar.update(task, advance=1, note=_note(row))
    return run.history


class _Run:
    """The state of one training run between epochs."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        names: list[str],
        recipe: Recipe,
        loader,
        val_loader,
        criterion: Criterion | None,
    ):
        self.accelerator = accelerator
        self.plain = model.to(accelerator.device)
        self.names = names
        self.recipe = recipe
        self.criterion = criterion
        self.facts = facts_of(model, names, loader, val_loader)
        self.generators = _generators(loader)
        # Accelerate's own wrapping would leave marks on the user's model for later calls to trip
        # over.
        self.model = model
        if accelerator.num_processes > 1:
            self.model = DistributedDataParallel(model)
        optimizer = create_optimizer_v2(
            model,
            opt=recipe.opt,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            momentum=recipe.momentum,
        )
        self.scheduler = cosine_schedule(optimizer, recipe)
        self.optimizer = accelerator.prepare(optimizer)
        self.loader = accelerator.prepare(loader)
        self.val_loader = None if val_loader is None else accelerator.prepare(val_loader)
        self.history: list[dict] = []
        self.updates = 0

    def epoch(self) -> dict:
        start, number = time.perf_counter(), len(self.history)
        good = {k: v.detach().clone() for k, v in state_of(self.plain).items()}
        _seed_everything(self.recipe.seed, number, self.accelerator.process_index)
        if hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(number)
        self.model.train()
        try:
            row = {"epoch": number + 1, **self._pass(number)}
            self._check_parameters(number)
            if self.val_loader is not None:
                found = evaluate_on(self.accelerator, self.plain, self.val_loader, self.criterion)
                row |= {"val_loss": found["loss"], "val_accuracy": found["accuracy"]}
        except NonFiniteLoss:
            copy_state(good, state_of(self.plain))
            raise
        row["seconds"] = time.perf_counter() - start
        self.history.append(row)
        return row

    def _check_parameters(self, number: int) -> None:
        for name, parameter in self._parameters().items():
            if not parameter.isfinite().all():
                raise NonFiniteLoss(
                    f"{name}: no longer finite after epoch {number + 1}: {self._advice()}"
                )

    def _advice(self) -> str:
        lr = self.recipe.lr
        return (
            f"lower lr (now {lr:g}; try {lr / 10:g}), or set clip_grad=1.0. The model is back at "
            "the start of the epoch"
        )

    def _pass(self, number: int) -> dict:
        totals = torch.zeros(3, dtype=torch.float64)  # loss, correct, samples
        recent: list[Tensor] = []
        lr = 0.0
        for step, batch in enumerate(self.loader):
            images, labels = images_and_labels(batch)
            self.scheduler.step_update(self.updates)
            lr = self.optimizer.param_groups[0]["lr"]
            with self.accelerator.autocast():
                logits = logits_of(self.model(images))
            losses = per_sample_loss(logits, labels, self.criterion, check=number == 0)
            self.optimizer.zero_grad()
            self.accelerator.backward(losses.mean())
            if self.recipe.clip_grad is not None:
                self.accelerator.clip_grad_norm_(self._parameters().values(), self.recipe.clip_grad)
            self.optimizer.step()
            self.updates += 1
            hits = logits.detach().argmax(-1) == labels
            losses, hits = gathered(self.accelerator, losses.detach(), hits)
            recent.append(torch.stack([losses.double().sum(), hits.sum(), _count(losses)]))
            if (step + 1) % CHECK_EVERY == 0:
                totals += self._checked(recent, number, step)
                recent = []
        if recent:
            totals += self._checked(recent, number, step)
        loss, correct, samples = totals.tolist()
        if not samples:
            raise ValueError("loader: it yielded no sample")
        return {
            "loss": loss / samples,
            "accuracy": 100 * correct / samples,
            "samples": int(samples),
            "lr": lr,
        }

    def _checked(self, recent: list[Tensor], number: int, step: int) -> Tensor:
        rows = torch.stack(recent).cpu()
        bad = (~rows[:, 0].isfinite()).nonzero()
        if len(bad):
            at = step + 1 - len(recent) + int(bad[0])
            raise NonFiniteLoss(
                f"loss: {rows[bad[0], 0].item()} in epoch {number + 1}, step {at + 1}: "
                f"{self._advice()}"
            )
        return rows.sum(0)

    def _parameters(self) -> dict[str, nn.Parameter]:
        parameters = dict(self.plain.named_parameters())
        return {name: parameters[name] for name in self.names}

    def _buffers(self) -> dict[str, Tensor]:
        parameters = {id(p) for p in self.plain.parameters()}
        return {n: t for n, t in state_of(self.plain).items() if id(t) not in parameters}

    def save(self, file: Path) -> None:
        """Writes the whole state beside the old file, then puts it in its place."""
        state = {
            "pcx_fit": VERSION,
            "recipe": asdict(self.recipe),
            "parameters": {k: v.detach().cpu() for k, v in self._parameters().items()},
            "buffers": {k: v.detach().cpu() for k, v in self._buffers().items()},
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "updates": self.updates,
            "generators": [g.get_state() for g in self.generators],
        }
        with written_whole(file) as part:
            torch.save(state, part)

    def restore(self, file: Path) -> None:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            fits = state["pcx_fit"] in (1, VERSION)  # 1 had no buffers
        except Exception as error:
            raise ValueError(
                f"checkpoint_dir: {file} is not a checkpoint of pcx.fit ({error})"
            ) from error
        mine, theirs = asdict(self.recipe), state["recipe"]
        differ = [k for k in mine if mine[k] != theirs.get(k)]
        shapes = {k: tuple(v.shape) for k, v in self._parameters().items()}
        if (
            differ
            or not fits
            or shapes != {k: tuple(v.shape) for k, v in state["parameters"].items()}
        ):
            what = (
                ", ".join(f"{k} {theirs.get(k)} (now {mine[k]})" for k in differ)
                or "its parameters"
            )
            raise ValueError(
                f"resume: {file} is of another run: {what}. Use the same arguments and model, or "
                "another checkpoint_dir"
            )
        copy_state(state["parameters"], self._parameters())
        copy_state(state.get("buffers", {}), self._buffers())
        self.optimizer.load_state_dict(state["optimizer"])
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
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not names:
        raise ValueError("model: no parameter requires a gradient (no prompts and no head?)")
    return names


def _frozen(model: nn.Module, names: list[str]) -> str:
    return fingerprint((n, p) for n, p in model.named_parameters() if n not in names)


def _count(losses: Tensor) -> Tensor:
    return torch.tensor(len(losses), dtype=torch.float64, device=losses.device)


def _say_facts(console: Console, model, names, recipe: Recipe, accelerator) -> None:
    parameters = dict(model.named_parameters())
    trained = sum(parameters[n].numel() for n in names)
    total = sum(p.numel() for p in parameters.values())
    console.print(
        f"training {trained:,} of {total:,} parameters ({100 * trained / total:.2f}%), "
        f"lr {recipe.lr:g}, {recipe.epochs} epochs, on {accelerator.device}"
    )
    if not isinstance(model, TunedModel):
        return
    config = data_config(model)
    console.print(
        f"the backbone expects images of {'x'.join(map(str, config['input_size']))} normalised by "
        f"mean {tuple(config['mean'])} and std {tuple(config['std'])}"
    )


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=console.quiet,
    )


def _note(row: dict) -> str:
    note = f"loss {row['loss']:.3f}  accuracy {row['accuracy']:.1f}%"
    if "val_accuracy" in row:
        note += f"  validation {row['val_accuracy']:.1f}%"
    return note
