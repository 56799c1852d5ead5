"""One training of a comparison: a method, a task, a cell of its grid and a seed."""

from __future__ import annotations

import copy
import hashlib
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pcx.arguments import whole_number
from pcx.backbones.residual import Wrapper
from pcx.backbones.setr import SETR
from pcx.checkpoints.fingerprint import backbone_name, fingerprint
from pcx.checkpoints.saving import save
from pcx.experiments.grids import Cell
from pcx.experiments.ledger import text_of
from pcx.experiments.methods import build_method
from pcx.models import HEAD_INITS
from pcx.models.base import TunedModel
from pcx.tasks import Task
from pcx.training.callbacks import Callback
from pcx.training.evaluation import accelerator_for, evaluate
from pcx.training.fitting import fit
from pcx.training.losses import NonFiniteInput, NonFiniteLoss
from pcx.training.objectives import Segmentation, SingleLabel, objective_for
from pcx.training.run_folder import device_name

# A model that is trained on the first is tested on the second.
TESTED_ON = {"train": "val", "trainval": "test"}
HEAD_SEED = 0  # of the backbone's own head, which head_init="keep" starts from


class Trial(NamedTuple):
    """What decides a training, besides what all trials of a comparison share.

    Attributes:
        task: its name.
        method: its text.
        cell: of the method's grid.
        split: "train", which is tested on val, or "trainval", which is tested on test.
        seed: one of the comparison's.
        epochs: None for the recipe's.
        saved: whether the trained model is kept, for work that starts from it.
    """

    task: str
    method: str
    cell: Cell
    split: str
    seed: int
    epochs: int | None = None
    saved: bool = False

    def as_json(self) -> dict[str, Any]:
        """The trial as a ledger holds it."""
        more = {"epochs": self.epochs, "saved": self.saved}
        found = {**self._asdict(), "cell": list(self.cell)}
        return {k: v for k, v in found.items() if k not in more or more[k]}

    @property
    def own_seed(self) -> int:
        """The seed of the trial's random numbers, which no other trial has or changes."""
        return seed_of(self.as_json())

    def run(self, study: Any) -> dict[str, Any]:
        """Trains the model and tests it once, as `Setup.run` does; keeps it where it is saved."""
        return study.setup.run(self, study.model_file(self) if self.saved else None)

    def said(self, result: Mapping[str, Any]) -> str:
        """The result in a few words."""
        said = "diverged" if result["diverged"] else f"{result['accuracy']:.2f}%"
        return f"{TESTED_ON[self.split]} {said}"

    def __str__(self) -> str:
        epochs = "" if self.epochs is None else f", {self.epochs} epochs"
        return f"{self.method} on {self.task}, {self.cell}{epochs}, seed {self.seed}"


def seed_of(work: Mapping[str, Any]) -> int:
    """The seed of a piece of work's random numbers, which its JSON decides."""
    return int.from_bytes(hashlib.sha256(text_of(work).encode()).digest()[:4], "big") >> 1


@dataclass(frozen=True)
class Recipe:
    """What all trainings of a comparison share besides the backbone, as `pcx.fit` takes it."""

    epochs: int = 100
    batch_size: int = 64
    amp: str = "no"
    execution: str = "auto"
    head_init: str = HEAD_INITS[0]
    num_workers: int = 0


@dataclass
class Setup:
    """The tasks and the backbone of a comparison, on which its trials run.

    Args:
        tasks: by name.
        new_backbone: number of classes -> the backbone; a function of a module where trials run in
            several processes.
        recipe: of all trainings.
    """

    tasks: Mapping[str, Task]
    new_backbone: Callable[[int], nn.Module]
    recipe: Recipe = field(default_factory=Recipe)
    _built: dict[tuple[int, str], nn.Module] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """All but the backbones, which a process builds itself."""
        return {**self.__dict__, "_built": {}}

    def backbone(self, num_classes: int, objective: str = SingleLabel.name) -> nn.Module:
        """A copy of the backbone on the device of the trainings, for pixels with SETR's decoder."""
        key = num_classes, objective
        if key not in self._built:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(HEAD_SEED)
                if objective == Segmentation.name:
                    self._built[key] = SETR(self.new_backbone(0), num_classes)
                else:
                    self._built[key] = self.new_backbone(num_classes)
        return copy.deepcopy(self._built[key]).to(self.device)

    @property
    def device(self) -> torch.device:
        """Where models are trained; a ValueError where that cannot be done with this precision."""
        with accelerator_for(self.recipe.amp) as accelerator:
            return accelerator.device

    def build(self, trial: Trial) -> TunedModel:
        """The trial's model, not trained."""
        task = self.tasks[trial.task]
        torch.manual_seed(trial.own_seed)
        return build_method(
            trial.method,
            self.backbone(task.num_classes, task.objective),
            self.loader(trial.task, trial.split),
            head_init=self.recipe.head_init,
        )

    def run(self, trial: Trial, file: Path | None = None) -> dict[str, Any]:
        """Trains a trial's model to the last epoch, and tests it once.

        Args:
            trial: says what is trained, and on what.
            file: where the trained model is saved; None for nowhere.

        Returns:
            {"diverged": False, "accuracy": percent, "loss": mean} and the facts of the training:
            "parameters" without the head, "head_parameters", "ms_per_step" and "peak_mib", None
            where they are not known. Of a training that diverged {"diverged": True}. The accuracy
            of a task of pixels is the mIoU.

        Raises:
            NonFiniteInput: an image is not finite.
        """
        model, recipe, cell = self.build(trial), self.recipe, trial.cell
        objective = objective_for(self.tasks[trial.task].objective)
        times, cuda = StepTimes(), self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            fit(
                model,
                self.loader(trial.task, trial.split),
                epochs=trial.epochs or recipe.epochs,
                **cell._asdict(),
                objective=objective,
                amp=recipe.amp,
                execution=recipe.execution,
                seed=trial.own_seed,
                callbacks=times,
                progress=False,
            )
            peak = torch.cuda.max_memory_allocated(self.device) / 2**20 if cuda else None
            found = self.tested(trial.task, TESTED_ON[trial.split], model)
        except NonFiniteInput:
            raise
        except NonFiniteLoss:
            return {"diverged": True}
        if file is not None:
            save(model, file)
        return {
            "diverged": False,
            **found,
            **counted(model),
            "ms_per_step": times.median(),
            "peak_mib": peak,
        }

    def tested(self, task: str, split: str, model: nn.Module) -> dict[str, float]:
        """{"accuracy": percent, "loss": mean} of a model on a split."""
        objective = objective_for(self.tasks[task].objective)
        found = evaluate(
            model,
            self.loader(task, split),
            objective=objective,
            amp=self.recipe.amp,
            execution=self.recipe.execution,
        )
        return {"accuracy": found[objective.metric], "loss": found["loss"]}

    def loader(self, task: str, split: str) -> Any:
        """A loader of a split, as the recipe has it."""
        recipe = self.recipe
        return self.tasks[task].loader(split, recipe.batch_size, num_workers=recipe.num_workers)


def shared_settings(setup: Setup) -> dict[str, Any]:
    """What all trainings share, as JSON."""
    recipe, plain = setup.recipe, setup.new_backbone(0)
    photos = {name: t.digest for name, t in setup.tasks.items() if t.digest is not None}
    return {
        "backbone": backbone_name(plain),
        "weights": fingerprint(plain.named_parameters())[:16],
        "epochs": whole_number("epochs", recipe.epochs, 1),
        "batch_size": recipe.batch_size,
        "amp": recipe.amp,
        "head_init": recipe.head_init,
        "device": device_name(str(setup.device)).split(",")[0],
        **({"photos": photos} if photos else {}),
    }


def counted(model: TunedModel) -> dict[str, int]:
    """How many parameters a model trains: {"parameters", "head_parameters"}.

    The papers count what a method adds, and the head, which is as large for all, apart. The linear
    layer of the logits is the head; hidden layers before it are the method's.
    """
    heads = [head.inner if isinstance(head, Wrapper) else head for head in model.heads]
    of_heads = {id(p) for head in heads for p in head.parameters()}
    trained = {id(p): p.numel() for p in model.trainable().values()}
    head = sum(count for key, count in trained.items() if key in of_heads)
    return {"parameters": sum(trained.values()) - head, "head_parameters": head}


class StepTimes(Callback):
    """Measures the time from step to step, within epochs, with the loader's part in it.

    On a GPU events are recorded, which wait for nothing.
    """

    def __init__(self) -> None:
        self._marks: list[tuple[int, Any]] = []

    def on_step(self, epoch: int, step: int, losses: Tensor) -> None:
        """Marks the end of a step."""
        mark: Any = time.perf_counter()
        if losses.is_cuda:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        self._marks.append((epoch, mark))

    def median(self) -> float | None:
        """The median in milliseconds; None where no epoch has two steps."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        times = [_between(a, b) for (first, a), (second, b) in pairs if first == second]
        return statistics.median(times) if times else None


def _between(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return 1000 * (end - start)
    end.synchronize()
    return start.elapsed_time(end)
