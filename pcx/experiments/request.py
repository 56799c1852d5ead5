"""What a user asks a suite for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from pcx.experiments.grids import Changes
from pcx.experiments.ledger import Ledger
from pcx.experiments.study import Study, check_alone
from pcx.experiments.trials import Recipe, Setup, shared_settings
from pcx.tasks import Task


@dataclass(frozen=True)
class Request:
    """What a user asks a suite for; None leaves the suite's own.

    Attributes:
        out: the folder.
        new_backbone: number of classes, 0 for no head -> the backbone; a function of a module
            where work is done in several processes.
        load: a task's name -> the task.
        tasks: names.
        quick: the suite's small form.
        seeds: how many, 0 and on.
        recipe: fields of `Recipe` by name.
        changes: to the grids.
        plan: fields of the suite's own plan by name.
        processes, storage, say: as `pcx.experiments.study.Study` and `Ledger` take them.
    """

    out: Path
    new_backbone: Callable[[int], nn.Module]
    load: Callable[[str], Task]
    tasks: tuple[str, ...] | None = None
    quick: bool = False
    seeds: int | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    changes: Changes = field(default_factory=Changes)
    plan: Mapping[str, Any] = field(default_factory=dict)
    processes: int = 1
    storage: str | None = None
    say: Callable[[str], None] = print

    def loaded(self, names: tuple[str, ...]) -> tuple[dict[str, Task], list[tuple[str, str]]]:
        """The tasks of the user's or the suite's names, and which cannot be loaded and why.

        Raises:
            ValueError: none can be loaded.
        """
        tasks, failures = dict[str, Task](), list[tuple[str, str]]()
        for name in names if self.tasks is None else self.tasks:
            try:
                task = self.load(name)
                tasks[task.name] = task
            except (ValueError, OSError) as error:
                failures.append((name, (str(error) or type(error).__name__).splitlines()[0]))
                self.say(f"{name}: left out: {failures[-1][1]}")
        if not tasks:
            said = f"{failures[0][0]}: {failures[0][1]}" if failures else "got none"
            raise ValueError(f"task: none can be loaded; {said}")
        return tasks, failures

    def opened(self, tasks: Mapping[str, Task], recipe: Recipe, plan: Mapping[str, Any]) -> Study:
        """The study in the folder, whose settings are those of all its work and the plan.

        Raises:
            ValueError: several processes were launched, or the folder is of other settings.
        """
        check_alone("study")
        setup = Setup(tasks, self.new_backbone, recipe)
        settings = {**shared_settings(setup), **plan}
        ledger = Ledger(self.out, settings, str(setup.device), self.storage)
        return Study(setup, ledger, self.say, self.processes, keep_going=True)


def replaced(default: Any, changes: Mapping[str, Any]) -> Any:
    """`dataclasses.replace` with the fields that are given, but those that are None."""
    known = {each.name for each in fields(default)}
    given = {name: value for name, value in changes.items() if value is not None}
    if not set(given) <= known:
        raise ValueError(f"plan: got {sorted(set(given) - known)}, expected some of {known}")
    return replace(default, **given)
