"""A comparison of methods: tasks by methods, under one protocol."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pcx.arguments import whole_number
from pcx.experiments import averages
from pcx.experiments.grids import Cell, Changes, grid_of
from pcx.experiments.ledger import Ledger
from pcx.experiments.methods import Method, parse_method
from pcx.experiments.protocol import Chosen, Protocol, check_splits
from pcx.experiments.study import Study, check_alone
from pcx.experiments.trials import Recipe, Setup, Trial, shared_settings
from pcx.extras import need
from pcx.tasks import Task
from pcx.training.execution import check_execution
from pcx.training.objectives import Segmentation


@dataclass(frozen=True)
class Row:
    """What a method has reached on a task.

    Attributes:
        task: its name.
        method: its text.
        cell: the chosen one.
        val_accuracy: of that cell, in percent; the search chose by it.
        cells: how many the grid has.
        diverged: how many of them diverged.
        edge: "lowest" or "highest" where the chosen rate is that of the grid's, else "".
        accuracies: on test, of each seed, in percent.
        parameters: that the method trains, without the head, as the papers count them.
        head_parameters: of the head.
        ms_per_step: median time of a training step of the first seed; None where no epoch has two
            steps.
        peak_mib: peak of a GPU's memory in that training; None on a CPU, which has no such figure.
    """

    task: str
    method: str
    cell: Cell
    val_accuracy: float
    cells: int
    diverged: int
    edge: str
    accuracies: tuple[float, ...]
    parameters: int
    head_parameters: int
    ms_per_step: float | None
    peak_mib: float | None

    @property
    def mean(self) -> float:
        """The mean accuracy of the seeds."""
        return statistics.fmean(self.accuracies)

    @property
    def interval(self) -> float | None:
        """Half the width of the mean's 95% t-interval; None of one seed."""
        return averages.interval(self.accuracies)


@dataclass(frozen=True)
class Comparison:
    """The rows of a comparison.

    Attributes:
        tasks: names, in order.
        methods: texts, in order.
        rows: one for each task and method.
        settings: what all trainings had in common.
        of_pixels: the tasks of which the accuracy is the mIoU.
    """

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    rows: tuple[Row, ...]
    settings: dict[str, Any]
    of_pixels: tuple[str, ...] = ()

    def row(self, task: str, method: str) -> Row:
        """The row of a task and a method."""
        return next(r for r in self.rows if (r.task, r.method) == (task, method))

    def of_method(self, method: str) -> list[Row]:
        """A method's rows in the order of the tasks."""
        return [self.row(task, method) for task in self.tasks]

    def average(
        self, method: str, mean: Callable[[Mapping[str, float]], float]
    ) -> tuple[float, float | None]:
        """An average over tasks, and half the width of its 95% t-interval over the seeds.

        Args:
            method: its text.
            mean: `averages.mean_of_tasks` or `averages.mean_of_groups`.
        """
        rows = self.of_method(method)
        seeds = [
            mean({row.task: row.accuracies[i] for row in rows})
            for i in range(len(rows[0].accuracies))
        ]
        return statistics.fmean(seeds), averages.interval(seeds)

    def p_value(self, method: str, other: str) -> float:
        """The p of Wilcoxon's one-tailed test that a method is better than another over tasks."""
        return averages.wilcoxon(
            [row.mean for row in self.of_method(method)],
            [row.mean for row in self.of_method(other)],
        )


def compare(
    tasks: Mapping[str, Task],
    methods: Sequence[str],
    new_backbone: Callable[[int], nn.Module],
    out: str | os.PathLike,
    *,
    recipe: Recipe | None = None,
    seeds: int = 3,
    changes: Changes | None = None,
    processes: int = 1,
    storage: str | None = None,
    say: Callable[[str], None] = print,
) -> Comparison:
    """Compares methods on tasks by `pcx.experiments.protocol`.

    Finished trainings are kept in the folder, and not repeated by a further call. Tasks, methods,
    seeds and grids may be added; what all trainings share must stay the same.

    Args:
        tasks: by name.
        methods: texts, as `pcx.experiments.methods.parse_method` reads them.
        new_backbone: number of classes, 0 for no head -> the backbone.
        out: the folder.
        recipe: epochs, batch size and the like.
        seeds: how many seeds, 0 and on, train each chosen cell.
        changes: to the default grids.
        processes: how many train at the same time; the first seed's trainings run alone.
        storage: Optuna's, in which further processes and machines share the comparison; None for a
            journal file in the folder, which they can share where they all see it.
        say: called with a line for each finished training.

    Raises:
        ValueError: an argument does not fit, the folder is of a comparison with other settings, or
            several processes were launched.
        NonFiniteLoss: every cell of a grid diverged, or a chosen one did on trainval.
        ImportError: scipy is not installed; nothing has run.
    """
    need("scipy", "a comparison")
    check_alone("comparison")
    recipe, changes = recipe or Recipe(), changes or Changes()
    seeds, processes = whole_number("seeds", seeds, 1), whole_number("processes", processes, 1)
    read = _read(methods)
    check_splits(tasks)
    cells = {m.text: grid_of(m.name, changes).cells(recipe.batch_size) for m in read}
    setup = Setup(tasks, new_backbone, recipe)
    check_execution(recipe.execution, setup.device)
    first = {tasks[name].objective: name for name in reversed(list(tasks))}
    for task in first.values():
        for text, of_method in cells.items():
            setup.build(Trial(task, text, of_method[0], "train", 0))
    settings = shared_settings(setup)
    ledger = Ledger(out, settings, str(setup.device), storage)
    searches = [(task, text, cells[text]) for task in tasks for text in cells]
    with Study(setup, ledger, say, processes) as study:
        protocol = Protocol(study)
        chosen: Any = protocol.search(searches)  # none is None: an error ends a comparison
        choices = [(t, m, c.cell) for (t, m, _), c in zip(searches, chosen, strict=True)]
        tested = protocol.test(choices, range(seeds))
    rows = [_row(*found) for found in zip(choices, chosen, tested, strict=True)]
    of_pixels = tuple(name for name, task in tasks.items() if task.objective == Segmentation.name)
    return Comparison(tuple(tasks), tuple(cells), tuple(rows), settings, of_pixels)


def _read(methods: Sequence[str]) -> list[Method]:
    """The methods of their texts."""
    read = [parse_method(text) for text in methods]
    texts = [method.text for method in read]
    twice = [text for i, text in enumerate(texts) if text in texts[:i]]
    if twice or not read:
        said = f"{twice[0]!r} is given twice" if twice else "got none"
        raise ValueError(f"methods: {said}; give each method once, and one at least")
    return read


def _row(choice: tuple[str, str, Cell], chosen: Chosen, results: Sequence[dict[str, Any]]) -> Row:
    first = results[0]  # which ran alone
    return Row(
        *choice[:2],
        chosen.cell,
        chosen.accuracy,
        chosen.cells,
        chosen.diverged,
        chosen.edge,
        tuple(result["accuracy"] for result in results),
        first["parameters"],
        first["head_parameters"],
        first["ms_per_step"],
        first["peak_mib"],
    )
