"""A training run: its epochs, its steps, and what it keeps between epochs."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from pcx.checkpoints.torch_file import write_torch
from pcx.models.base import TunedModel, copy_state, state_of
from pcx.training.batches import BatchCheck, LoaderWait, placed
from pcx.training.checkpoint import (
    VERSION,
    check_same_run,
    description_of,
    read_checkpoint,
)
from pcx.training.class_names import agreed_names
from pcx.training.evaluation import Evaluation, divided, gathered
from pcx.training.execution import check_execution, compiled, prepared
from pcx.training.kept_weights import Average, Best
from pcx.training.loaders import set_epoch, start_workers_anew
from pcx.training.losses import Losses, NonFiniteInput, NonFiniteLoss, seen_losses
from pcx.training.objectives import Objective
from pcx.training.optimizers import Gradients, Rates, load_plain, make_recordable, plain_state
from pcx.training.processes import Together
from pcx.training.recipe import (
    Recipe,
    cosine_schedule,
)
from pcx.training.run_folder import facts_of
from pcx.training.token_cache import FromTokens, cached_tokens

BACK = "The model is back at the start of the epoch"


class Run:
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
        best: str | None = None,
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
        alone = accelerator.num_processes == 1 and recipe.accumulate == 1
        self.whole = self.recordable and alone
        self.step: Any = prepared(
            lambda: self._whole_step if self.whole else self._gradients, device, execution
        )
        self.evaluation = Evaluation(accelerator, model, objective, execution, self.classes)
        self.average = None if recipe.ema is None else Average(self.parameters, recipe.ema)
        self.best = None if best is None else Best(best)
        self.on_step: Callable[[int, int, Tensor], None] = lambda *given: None
        self.history: list[dict] = []
        self.updates = 0

    def __enter__(self) -> Run:
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
        averages = {} if self.average is None else dict(self.average.state)
        if self.average is not None:
            self.average.state = {k: v.clone() for k, v in averages.items()}
        _seed_everything(self.recipe.seed, number, self.accelerator.process_index)
        if self.recipe.frozen is not None:
            start_workers_anew(self.loader)
        set_epoch(self.loader, number)
        self.model.train()
        try:
            row = {"epoch": number + 1, **self._pass(number)}
            self._check_parameters(number)
            with self.averaged():
                if self.val_loader is not None:
                    row |= self._validated()
                row["seconds"] = time.perf_counter() - start
                if self.best is not None:
                    self.best.look_at(row, state_of(self.model))
        except NonFiniteLoss:
            copy_state(good, state_of(self.model))
            if self.average is not None:
                self.average.state = averages
            raise
        self.history.append(row)
        return row

    def averaged(self) -> AbstractContextManager[None]:
        """Within it the weights are their moving averages, where the recipe has them."""
        return nullcontext() if self.average is None else self.average.in_place()

    def finish(self) -> None:
        """Gives the model the weights that the training is for: the best, the average, the last."""
        if self.best is not None and self.best.state:
            copy_state(self.best.state, state_of(self.model))
        elif self.average is not None:
            copy_state(self.average.state, self.parameters)

    def _validated(self) -> dict:
        try:
            found = self.evaluation.of(self.val_loader)
            del found["samples"]
            return {"val_loss": found.pop("loss"), **{f"val_{k}": v for k, v in found.items()}}
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
        waiting = Gradients(self.recipe.accumulate)
        try:
            batches = placed(self.loader, device, self.check, wait)
            for step, (images, labels) in enumerate(batches, 1):
                if not waiting.count:
                    self.scheduler.step_update(self.updates)
                    rate = self.rates.hand_over()
                found, *seen = self.step(images, labels)
                if not self.whole:
                    *seen, gradients = seen
                    waiting.add(gradients)
                self._follow(waiting, full=True)
                found, *rows = gathered(self.accelerator, found, *seen)
                metrics.update(*rows)
                losses.add(found)
                self.on_step(number + 1, step, found)
            self._follow(waiting, full=False)
            loss = losses.mean()
        except NonFiniteLoss as error:
            if isinstance(error, NonFiniteInput):
                raise NonFiniteInput(f"{error}. {BACK}") from None
            raise NonFiniteLoss(f"loss: {error}: {self._advice()}") from None
        # The mean loss has waited for the device.
        share = {"loader_share": wait.seconds / (time.perf_counter() - start)}
        return {"loss": loss, **metrics.compute(), "samples": losses.samples, "lr": rate, **share}

    def _follow(self, waiting: Gradients, *, full: bool) -> None:
        """Makes the update that gradients wait for, and what follows one.

        Args:
            waiting: the gradients, none where the step itself has made the update.
            full: whether more batches may come, so that the gradients of all are waited for.
        """
        if not self.whole:
            if not waiting.count or (full and waiting.count < waiting.wanted):
                return
            self._update(waiting.mean())
        elif not full:
            return
        self.updates += 1
        if self.average is not None:
            self.average.update(self.updates)

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
        if self.average is not None:
            state["average"] = {k: v.cpu() for k, v in self.average.state.items()}
        if self.best is not None:
            state["best"] = self.best.as_state()
        write_torch(state, file)

    def restore(self, file: Path) -> None:
        state = read_checkpoint(file)
        check_same_run(file, state, asdict(self.recipe), self.model, self.parameters)
        then = (state.get("best") or {}).get("metric")
        now = None if self.best is None else self.best.metric
        if then != now:
            raise ValueError(
                f"resume: {file} is of a run with best={then!r} (now {now!r}); use the same"
            )
        copy_state(state["parameters"], self.parameters)
        copy_state(state.get("buffers", {}), self._buffers())
        load_plain(self.optimizer, state["optimizer"])
        for generator, saved in zip(self.generators, state["generators"], strict=True):
            generator.set_state(saved)
        self.history, self.updates = state["history"], state["updates"]
        if self.average is not None:
            copy_state(state["average"], self.average.state)
        if self.best is not None:
            self.best.restore(state["best"])


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
