"""The numbers of a study of prompts, and averages over its tasks and seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from pcx.experiments import averages
from pcx.experiments.protocol import Chosen
from pcx.experiments.trials import Trial
from pcx.extras import need

Average = tuple[float, float | None]  # a mean, and half the width of its 95% interval over seeds


@dataclass
class Gathered:
    """All results of a study of prompts.

    Attributes:
        plan: of the study.
        settings: what all its work shares.
        tasks, seeds: in their order.
        rows: one for each trained or condensed model, all of one form.
        scores: by (task, seed), {method: per layer, a number each prompt}.
        without_layers, spectra: by (task, seed), what the work of that name gives.
        times: by task.
        looks: of tasks, what `Looks` gives.
        failures: (task, why) of tasks that are left out.
    """

    plan: Any
    settings: dict[str, Any]
    tasks: list[str]
    seeds: list[int]
    rows: list[dict[str, Any]] = field(default_factory=list)
    scores: dict[tuple[str, int], dict[str, list[list[float]]]] = field(default_factory=dict)
    without_layers: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    spectra: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    times: dict[str, dict[str, float]] = field(default_factory=dict)
    looks: list[dict[str, Any]] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)

    def add_trained(
        self,
        method: str,
        kind: str,
        share: float | None,
        trial: Trial,
        result: Mapping[str, Any],
        chosen: Chosen,
    ) -> None:
        """Adds a trained model: of `method` "linear" or "vpt", with a share of the prompts."""
        self._add(trial.task, trial.seed, method, kind, share, result)
        self.rows[-1] |= {
            **trial.cell._asdict(),
            "val_accuracy": chosen.accuracy,
            "edge": chosen.edge,
            "diverged_cells": chosen.diverged,
            "parameters": result["parameters"],
        }

    def add_condensed(
        self, kind: str, case: Mapping[str, Any], task: str, seed: int, result: Mapping[str, Any]
    ) -> None:
        """Adds a condensed model of a case of `Condensed`."""
        self._add(task, seed, "condensed", kind, case["keep"], result)
        self.rows[-1] |= {
            "score": case["method"],
            "scope": case["scope"],
            "tuned_epochs": case["epochs"],
            "counts": " ".join(map(str, result.get("counts", ()))),
        }

    def _add(self, task: str, seed: int, method: str, kind: str, share: Any, result: Any) -> None:
        row = {"task": task, "seed": seed, "method": method, "kind": kind, "share": share}
        row |= {"score": "", "scope": "", "tuned_epochs": "", "diverged": result["diverged"]}
        # A model whose fine-tuning diverged answers nothing.
        row |= {"accuracy": result.get("accuracy", 0.0), "loss": result.get("loss")}
        self.rows.append(row)

    def accuracies(self, **where: Any) -> dict[str, list[float]]:
        """By task, the accuracies of the seeds of the rows that have these values.

        Raises:
            LookupError: a task and seed has none, or several.
        """
        found: dict[str, list[float]] = {}
        for task in self.tasks:
            for seed in self.seeds:
                wanted = {"task": task, "seed": seed, **where}
                rows = [r for r in self.rows if all(r[k] == v for k, v in wanted.items())]
                if len(rows) != 1:
                    raise LookupError(f"{len(rows)} rows of {wanted}")
                found.setdefault(task, []).append(rows[0]["accuracy"])
        return found

    def by_seed(self, **where: Any) -> list[float]:
        """The mean over tasks of each seed."""
        rows = self.accuracies(**where)
        return [statistics.fmean(values) for values in zip(*rows.values(), strict=True)]

    def average(self, **where: Any) -> Average:
        """The mean over tasks and seeds."""
        return mean_of(self.by_seed(**where))

    def of_task(self, task: str, **where: Any) -> Average:
        """The mean over the seeds of a task."""
        return mean_of(self.accuracies(**where)[task])

    def of_groups(self, **where: Any) -> Average:
        """The mean of the means of groups of tasks, as VTAB has them."""
        rows = self.accuracies(**where)
        return mean_of(
            [
                averages.mean_of_groups({task: rows[task][i] for task in self.tasks})
                for i in range(len(self.seeds))
            ]
        )

    def difference(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> Average:
        """How much better one is than another, seed by seed."""
        pairs = zip(self.by_seed(**one), self.by_seed(**other), strict=True)
        return mean_of([a - b for a, b in pairs])

    def spearman(self, method: str) -> list[float]:
        """The rank correlation of a score with real removal: mean over tasks, of each seed."""
        need("scipy", "a rank correlation")
        from scipy.stats import spearmanr

        found = []
        for seed in self.seeds:
            values = []
            for task in self.tasks:
                scores = self.scores[task, seed]
                one, exact = ([*chain(*scores[name])] for name in (method, "exact"))
                values.append(float(spearmanr(one, exact).statistic))
            found.append(statistics.fmean(values))
        return found


def mean_of(values: Sequence[float]) -> Average:
    """The mean and half its 95% interval."""
    return statistics.fmean(values), averages.interval(values)
