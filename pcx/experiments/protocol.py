"""The protocol of a fair comparison: val chooses, trainval trains, test is read once."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, NamedTuple

import torch

from pcx.experiments.grids import Cell
from pcx.experiments.journal import Journal
from pcx.experiments.trials import Setup, Trial
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


class Protocol:
    """Runs the trials of a comparison, each of them once.

    For each task and method every cell of the grid is trained on "train" with one seed. The last
    epoch's accuracy on "val" chooses; ties go to the lower loss, then to the first cell. The chosen
    cell is trained anew on "trainval" with each seed, to the last epoch, and tested once.

    Args:
        setup: the tasks, the backbone and the recipe.
        journal: of the finished trials.
        say: called with a line for each trial that is finished.
        processes: in how many processes models are trained at the same time. The first seed's
            trainings on trainval run one after another, so that their times are not disturbed.
            Methods that `pcx.METHODS.add` has added are known in one process alone.

    Raises:
        ValueError: a task lacks a split.
    """

    def __init__(
        self,
        setup: Setup,
        journal: Journal,
        say: Callable[[str], None] = print,
        processes: int = 1,
    ):
        check_splits(setup.tasks)
        self.setup, self.journal, self.say, self.processes = setup, journal, say, processes

    def search(self, searches: Sequence[tuple[str, str, Sequence[Cell]]]) -> list[Chosen]:
        """Chooses a cell for each task and method of (task, method, cells).

        Raises:
            NonFiniteLoss: every cell of one diverged.
        """
        trials = [
            Trial(task, method, cell, "train", SEARCH_SEED)
            for task, method, cells in searches
            for cell in cells
        ]
        self._finish(trials)
        found = {(t.task, t.method, t.cell): self._found(t) for t in trials}
        return [
            choose(task, method, cells, [found[task, method, cell] for cell in cells])
            for task, method, cells in searches
        ]

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
        self._finish(trials[seeds[0]], processes=1)
        self._finish([trial for seed in seeds[1:] for trial in trials[seed]])
        by_seed = [[self._tested(trial) for trial in trials[seed]] for seed in seeds]
        return [list(results) for results in zip(*by_seed, strict=True)]

    def _tested(self, trial: Trial) -> dict[str, Any]:
        result = self._found(trial)
        if result["diverged"]:
            raise NonFiniteLoss(
                f"method: {trial} diverged on trainval, which it did not on train; give a grid of "
                f"rates under {trial.cell.lr:g}, or one that clips gradients"
            )
        return result

    def _found(self, trial: Trial) -> dict[str, Any]:
        result = self.journal.result_of(trial.as_json())
        assert result is not None, trial  # _finish has run it
        return result

    def _finish(self, trials: Sequence[Trial], processes: int | None = None) -> None:
        """Runs those of the trials that the journal does not have."""
        left = [trial for trial in trials if self.journal.result_of(trial.as_json()) is None]
        ran = run_all(self.setup, left, self.processes if processes is None else processes)
        for number, (trial, result) in enumerate(ran, 1):
            self.journal.add(trial.as_json(), result)
            said = "diverged" if result["diverged"] else f"{result['accuracy']:.2f}%"
            tested = "test" if trial.split == "trainval" else "val"
            self.say(f"{number}/{len(left)}: {trial}: {tested} {said}")


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


def choose(
    task: str, method: str, cells: Sequence[Cell], results: Sequence[dict[str, Any]]
) -> Chosen:
    """The cell of the highest accuracy, of several the one of the lowest loss, then the first.

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
    cell, result = max(whole, key=lambda found: (found[1]["accuracy"], -found[1]["loss"]))
    rates = sorted({each.lr for each in cells})
    edges = {rates[0]: "lowest", rates[-1]: "highest"} if len(rates) > 1 else {}
    diverged = len(cells) - len(whole)
    return Chosen(cell, result["accuracy"], diverged, len(cells), edges.get(cell.lr, ""))


def run_all(
    setup: Setup, trials: Sequence[Trial], processes: int = 1
) -> Iterator[tuple[Trial, dict[str, Any]]]:
    """Runs trials, and gives each with its result once it is finished, in any order."""
    if processes == 1 or len(trials) < 2:
        for trial in trials:
            yield trial, setup.run(trial)
        return
    threads = max(1, (os.cpu_count() or 1) // processes)
    with ProcessPoolExecutor(
        min(processes, len(trials)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(setup, threads),
    ) as pool:
        running = {pool.submit(_run, trial): trial for trial in trials}
        try:
            for done in as_completed(running):
                yield running[done], done.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_SETUP: list[Setup] = []  # of a process of `run_all`


def _start(setup: Setup, threads: int) -> None:
    torch.set_num_threads(threads)
    _SETUP[:] = [setup]


def _run(trial: Trial) -> dict[str, Any]:
    return _SETUP[0].run(trial)
