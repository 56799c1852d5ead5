"""The protocol of a fair comparison: val chooses, trainval trains, test is read once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pcx.experiments.grids import Cell
from pcx.experiments.study import Study
from pcx.experiments.trials import Trial
from pcx.tasks import Task
from pcx.training.losses import NonFiniteLoss

SEARCH_SEED = 0  # of the search, one for all
SPLITS = ("train", "val", "trainval", "test")


class Chosen(NamedTuple):
    """What a search has found.

    Attributes:
        cell: of the grid.
        accuracy: on val, in percent.
        diverged: how many cells diverged.
        cells: how many there are.
        edge: "lowest" or "highest" where the rate is that of several rates, so that a wider grid
            may hold a better one; else "".
    """

    cell: Cell
    accuracy: float
    diverged: int
    cells: int
    edge: str = ""


class Rung(NamedTuple):
    """A round of a search.

    Attributes:
        share: of the recipe's epochs that its trainings take, in (0, 1].
        cells: the share of the round before's cells that are in it.
    """

    share: float
    cells: float


WHOLE = (Rung(1.0, 1.0),)  # a search without rounds


class _Search:
    """A search that is under way."""

    def __init__(self, task: str, method: str, cells: Sequence[Cell]):
        self.task, self.method, self.cells = task, method, tuple(cells)
        self.alive, self.diverged, self.over = list(cells), 0, False
        self.chosen: Chosen | None = None


class Protocol:
    """Runs the trials of a comparison, each of them once.

    For each task and method every cell of the grid is trained on "train" with one seed. The last
    epoch's accuracy on "val" chooses; ties go to the lower loss, then to the first cell. The chosen
    cell is trained anew on "trainval" with each seed, to the last epoch, and tested once.

    A search may have several rungs: all cells are trained for a share of the epochs, and the best
    of them anew for more. A rung begins when the one before is finished for all cells of its task
    and method, so that which cells go on does not depend on the order in which trainings end.

    Args:
        study: does the trainings. The first seed's trainings on trainval run one after another, so
            that their times are not disturbed.
        rungs: of every search; the last has the whole epochs.

    Raises:
        ValueError: a task lacks a split.
    """

    def __init__(self, study: Study, rungs: Sequence[Rung] = WHOLE):
        check_splits(study.setup.tasks)
        self.study, self.rungs = study, rungs

    def search(self, searches: Sequence[tuple[str, str, Sequence[Cell]]]) -> list[Chosen | None]:
        """Chooses a cell for each task and method of (task, method, cells).

        Returns:
            For each search what it has found; None where a trial failed, or all diverged, in a
            study that keeps going, whose `failed` says why by the task's name.

        Raises:
            NonFiniteLoss: every cell of one diverged.
        """
        running = [_Search(*each) for each in searches]
        for rung, further in zip(self.rungs, [*self.rungs[1:], None], strict=True):
            alive = [search for search in running if not search.over]
            trials = {
                id(s): [self._trial(s.task, s.method, c, rung) for c in s.alive] for s in alive
            }
            self.study.finish([trial for each in trials.values() for trial in each])
            for search in alive:
                try:
                    self._ends_rung(search, trials[id(search)], further)
                except NonFiniteLoss as error:
                    if not self.study.keep_going:
                        raise
                    self.study.failed.setdefault(search.task, str(error))
        return [search.chosen for search in running]

    def _ends_rung(self, search: _Search, trials: list[Trial], further: Rung | None) -> None:
        why = self.study.why_failed(trials)
        if why is not None:
            self.study.failed.setdefault(search.task, why)
            search.over = True
            return
        results = [self.study.result_of(trial) for trial in trials]
        search.diverged += sum(result["diverged"] for result in results)
        search.over = True  # where all diverged, which the next line raises
        best = ranked(search.task, search.method, search.alive, results)
        search.over = further is None
        if further is None:
            search.chosen = choose(
                search.task, search.method, search.alive, results, search.cells, search.diverged
            )
            return
        kept = {cell for cell, _ in best[: math.ceil(further.cells * len(search.alive))]}
        search.alive = [cell for cell in search.alive if cell in kept]

    def _trial(self, task: str, method: str, cell: Cell, rung: Rung) -> Trial:
        whole = self.study.setup.recipe.epochs
        epochs = None if rung.share == 1 else max(1, round(rung.share * whole))
        return Trial(task, method, cell, "train", SEARCH_SEED, epochs)

    def test(
        self, choices: Sequence[tuple[str, str, Cell]], seeds: Sequence[int]
    ) -> list[list[dict[str, Any]]]:
        """Trains each (task, method, cell) on trainval with each seed, and tests each model once.

        Returns:
            For each choice the results of its seeds.

        Raises:
            NonFiniteLoss: a training diverged.
        """
        trials = {seed: [Trial(*choice, "trainval", seed) for choice in choices] for seed in seeds}
        self.study.finish(trials[seeds[0]], alone=True)
        self.study.finish([trial for seed in seeds[1:] for trial in trials[seed]])
        by_seed = [[tested(self.study, trial) for trial in trials[seed]] for seed in seeds]
        return [list(results) for results in zip(*by_seed, strict=True)]


def check_splits(tasks: Mapping[str, Task]) -> None:
    """Raises a ValueError where there is no task, or one lacks a split."""
    if not tasks:
        raise ValueError("task: got none; give one at least")
    for name, task in tasks.items():
        missing = [split for split in SPLITS if split not in task.splits]
        if missing:
            raise ValueError(
                f"task: {name} has no split {missing[0]!r}, and the protocol chooses on val and "
                "tests on test; give a task that has all four"
            )


def tested(study: Study, trial: Trial) -> dict[str, Any]:
    """The result of a trial that is finished.

    Raises:
        NonFiniteLoss: it diverged.
    """
    result = study.result_of(trial)
    if result["diverged"]:
        raise NonFiniteLoss(
            f"method: {trial} diverged on trainval, which it did not on train; give a grid of "
            f"rates under {trial.cell.lr:g}, or one that clips gradients"
        )
    return result


def ranked(
    task: str, method: str, cells: Sequence[Cell], results: Sequence[dict[str, Any]]
) -> list[tuple[Cell, dict[str, Any]]]:
    """Cells and results by accuracy, of several the lower loss first, then the first of the grid.

    Raises:
        NonFiniteLoss: all cells diverged.
    """
    whole = [(c, r) for c, r in zip(cells, results, strict=True) if not r["diverged"]]
    if not whole:
        rates = [cell.lr for cell in cells]
        raise NonFiniteLoss(
            f"method: {method} on {task}: all {len(cells)} cells of its grid diverged, of rates "
            f"{min(rates):g} to {max(rates):g}; give a grid of lower rates, or one that clips"
        )
    return sorted(whole, key=lambda found: (-found[1]["accuracy"], found[1]["loss"]))


def choose(
    task: str,
    method: str,
    cells: Sequence[Cell],
    results: Sequence[dict[str, Any]],
    grid: Sequence[Cell] | None = None,
    diverged: int | None = None,
) -> Chosen:
    """The best cell of a search's last rung.

    Args:
        task, method: names, for the message of an error.
        cells: in the last rung.
        results: theirs.
        grid: all cells of the search; None where those are all.
        diverged: how many of them diverged.

    Raises:
        NonFiniteLoss: all cells diverged.
    """
    cell, result = ranked(task, method, cells, results)[0]
    grid = cells if grid is None else grid
    rates = sorted({each.lr for each in grid})
    edges = {rates[0]: "lowest", rates[-1]: "highest"} if len(rates) > 1 else {}
    if diverged is None:
        diverged = sum(each["diverged"] for each in results)
    return Chosen(cell, result["accuracy"], diverged, len(grid), edges.get(cell.lr, ""))
