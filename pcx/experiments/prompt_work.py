"""What a study does with a trained VPT: scores, condensations, and looks inside."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pcx.analysis.attention_maps import attention_maps, cumulative_eigenvalues
from pcx.checkpoints.saving import load
from pcx.condensation.condensing import condense
from pcx.condensation.scoring import score
from pcx.experiments.trials import Trial, seed_of
from pcx.models.vpt.model import VPT
from pcx.training.fitting import fit
from pcx.training.losses import NonFiniteLoss

if TYPE_CHECKING:
    from pcx.experiments.study import Study

SPECTRUM_IMAGES = 8
SLOWER = 0.1  # of the trained rate, at which condensed prompts are fine-tuned (Sec. 6.1)
TIMED_EPOCHS = 3  # of training and fine-tuning, of which the last is timed


def trained_model(study: Study, trial: Trial) -> Any:
    """The model of a trial whose model is kept; where its file is gone it is trained anew."""
    file = study.model_file(trial)
    if not file.exists():
        study.setup.run(trial, file)
    task = study.setup.tasks[trial.task]
    model = load(file, study.setup.backbone(task.num_classes, task.objective))
    return model.to(study.setup.device)


def given(study: Study, task: str) -> dict[str, Any]:
    """The arguments that scoring and fine-tuning share with training."""
    recipe = study.setup.recipe
    shared = {"amp": recipe.amp, "execution": recipe.execution, "progress": False}
    return {"objective": study.setup.tasks[task].objective, **shared}


@dataclass(frozen=True)
class Scored:
    """All prompts' scores by several methods, on the images that the model was trained on.

    Attributes:
        trial: whose model is kept.
        methods: of `pcx.score`.
    """

    trial: Trial
    methods: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """What decides the scores."""
        return {"kind": "scores", "trial": self.trial.as_json(), "methods": list(self.methods)}

    def run(self, study: Study) -> dict[str, Any]:
        """{method: per layer, one number a prompt}."""
        found = score(
            trained_model(study, self.trial),
            study.setup.loader(self.trial.task, "trainval"),
            method=self.methods,
            seed=seed_of(self.as_json()),
            **given(study, self.trial.task),
        )
        return {
            name: [[float(f"{value:.9g}") for value in row.tolist()] for row in rows]
            for name, rows in found.items()
        }

    def by(self, study: Study, method: str) -> list[Tensor]:
        """The scores of a method once they are known, as `pcx.condense` takes them."""
        rows = study.result_of(self)[method]
        return [torch.tensor(row, dtype=torch.float64) for row in rows]

    def said(self, result: Mapping[str, Any]) -> str:
        """How many prompts were scored."""
        return f"{sum(map(len, result[self.methods[0]]))} prompts scored"

    def __str__(self) -> str:
        return f"scores of {self.trial.method} on {self.trial.task}, seed {self.trial.seed}"


@dataclass(frozen=True)
class Condensed:
    """A model condensed by one score, and tested.

    Attributes:
        scored: the scores.
        method: which of them.
        keep: the share of the prompts that is kept.
        scope: "global" or "local".
        epochs: of fine-tuning, at a tenth of the rate; 0 for none.
    """

    scored: Scored
    method: str
    keep: float
    scope: str
    epochs: int

    def as_json(self) -> dict[str, Any]:
        """What decides the result."""
        rest = {"method": self.method, "keep": self.keep, "scope": self.scope}
        scored = self.scored.as_json()
        return {"kind": "condensed", "scored": scored, **rest, "epochs": self.epochs}

    def run(self, study: Study) -> dict[str, Any]:
        """{"diverged", "accuracy", "loss", "counts"}."""
        trial, cell = self.scored.trial, self.scored.trial.cell
        model = trained_model(study, trial)
        try:
            small = condense(
                model,
                study.setup.loader(trial.task, "trainval"),
                self.keep,
                scores=self.scored.by(study, self.method),
                scope=self.scope,
                epochs=self.epochs,
                lr=SLOWER * cell.lr,
                opt=cell.opt,
                weight_decay=cell.weight_decay,
                clip_grad=cell.clip_grad,
                seed=seed_of(self.as_json()),
                **given(study, trial.task),
            )
            found = study.setup.tested(trial.task, "test", small)
        except NonFiniteLoss:
            return {"diverged": True}
        return {"diverged": False, **found, "counts": list(small.counts)}

    def said(self, result: Mapping[str, Any]) -> str:
        """The accuracy."""
        return "diverged" if result["diverged"] else f"test {result['accuracy']:.2f}%"

    def __str__(self) -> str:
        trial = self.scored.trial
        tuned = f"{self.epochs} epochs" if self.epochs else "not fine-tuned"
        return (
            f"{100 * self.keep:g}% of {trial.method} on {trial.task} by {self.method}, "
            f"{self.scope}, {tuned}, seed {trial.seed}"
        )


@dataclass(frozen=True)
class WithoutLayers:
    """A model tested without the prompts of each layer in turn (Prompt Condensation, Fig. 3).

    Attributes:
        trial: whose model is kept.
    """

    trial: Trial

    def as_json(self) -> dict[str, Any]:
        """What decides the result."""
        return {"kind": "without layers", "trial": self.trial.as_json()}

    def run(self, study: Study) -> dict[str, Any]:
        """{"whole": percent, "without": percent by layer}."""
        model, task = trained_model(study, self.trial), self.trial.task
        found = []
        for layer in range(len(model.counts)):
            kept = [torch.arange(0 if i == layer else m) for i, m in enumerate(model.counts)]
            found.append(study.setup.tested(task, "test", model.keep(kept))["accuracy"])
        return {"whole": study.setup.tested(task, "test", model)["accuracy"], "without": found}

    def said(self, result: Mapping[str, Any]) -> str:
        """The range of the accuracies."""
        return f"test {min(result['without']):.2f} to {max(result['without']):.2f}%"

    def __str__(self) -> str:
        trial = self.trial
        return f"{trial.method} on {trial.task} without a layer's prompts, seed {trial.seed}"


@dataclass(frozen=True)
class Spectrum:
    """The eigenvalues of attention matrices with and without prompts (Prompt Condensation, Fig. 2).

    Attributes:
        trial: whose model is kept.
    """

    trial: Trial

    def as_json(self) -> dict[str, Any]:
        """What decides the result."""
        return {"kind": "spectrum", "trial": self.trial.as_json()}

    def run(self, study: Study) -> dict[str, Any]:
        """{"with", "without": cumulative shares, mean over layers and images}."""
        model = trained_model(study, self.trial).float()
        images = next(iter(study.setup.loader(self.trial.task, "test")))[0][:SPECTRUM_IMAGES]
        found = {}
        for name, each in (
            ("with", model),
            ("without", model.keep([torch.arange(0)] * len(model.counts))),
        ):
            maps = attention_maps(each, images.to(study.setup.device).float())
            shares = [cumulative_eigenvalues(layer.cpu()).mean(0) for layer in maps]
            found[name] = [round(value, 6) for value in torch.stack(shares).mean(0).tolist()]
        return found

    def said(self, result: Mapping[str, Any]) -> str:
        """How many eigenvalues hold nine tenths of the sum."""
        counts = {name: sum(v < 0.9 for v in values) + 1 for name, values in result.items()}
        return f"90% in {counts['with']} eigenvalues, {counts['without']} without prompts"

    def __str__(self) -> str:
        return f"eigenvalues of {self.trial.method} on {self.trial.task}, seed {self.trial.seed}"


@dataclass(frozen=True)
class StageTimes:
    """Seconds of an epoch of training, of scoring, and of an epoch of fine-tuning (Fig. 8).

    Attributes:
        trial: whose model is kept.
        keep: the share that is fine-tuned.
    """

    trial: Trial
    keep: float

    def as_json(self) -> dict[str, Any]:
        """What decides the result."""
        return {"kind": "stage times", "trial": self.trial.as_json(), "keep": self.keep}

    def run(self, study: Study) -> dict[str, Any]:
        """{"train_epoch", "score", "tune_epoch": seconds}, each of a second run of the same."""
        trial, shared = self.trial, given(study, self.trial.task)
        loader = study.setup.loader(trial.task, "trainval")
        model = trained_model(study, trial)
        seconds, scores = 0.0, []
        for _ in range(2):
            start = time.perf_counter()
            scores = score(model, loader, **shared)
            seconds = time.perf_counter() - start
        small = condense(model, loader, self.keep, scores=scores, epochs=0, **shared)
        return {
            "train_epoch": _epoch(model, loader, trial, shared),
            "score": seconds,
            "tune_epoch": _epoch(small, loader, trial, shared),
        }

    def said(self, result: Mapping[str, Any]) -> str:
        """The three times."""
        return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in result.items())

    def __str__(self) -> str:
        return f"times of {self.trial.method} on {self.trial.task}"


def _epoch(model: VPT, loader: Any, trial: Trial, shared: Mapping[str, Any]) -> float:
    """Seconds of the last of a few epochs."""
    history = fit(
        model.copy(),
        loader,
        epochs=TIMED_EPOCHS,
        **trial.cell._replace(lr=SLOWER * trial.cell.lr)._asdict(),
        warmup_epochs=0,
        **shared,
    )
    return history[-1]["seconds"]
