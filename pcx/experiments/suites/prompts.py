"""Prompt Condensation's study: VPT with fewer prompts, and prompts condensed by every score."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pcx.arguments import real_number, whole_number
from pcx.backbones.spec import find_spec
from pcx.condensation import SCORES
from pcx.experiments.grids import Cell, Grid, changed
from pcx.experiments.looks import Looks
from pcx.experiments.prompt_work import Condensed, Scored, Spectrum, StageTimes, WithoutLayers
from pcx.experiments.protocol import Chosen, Protocol, Rung
from pcx.experiments.request import Request, replaced
from pcx.experiments.results import Results
from pcx.experiments.study import Study, Unit
from pcx.experiments.suites.gathered import Gathered
from pcx.experiments.suites.prompt_results import written_up
from pcx.experiments.trials import Recipe, Trial
from pcx.tasks.listed import VTAB_CLASSES

KINDS = DEEP, SHALLOW = "deep", "shallow"
FIRST = "taylor"  # the score that the paper proposes, at every keep and scope
LINEAR = "linear"
# One pass gives all of these. "exact" is a pass for every prompt, and work of its own.
ONE_PASS = ("taylor", "taylor-inner", "gate", "cls-attention", "magnitude", "random")
EXACT, OF_CLS = "exact", "cls-attention"


@dataclass(frozen=True)
class Plan:
    """What the study does, besides the recipe of its trainings.

    Attributes:
        prompts: of each layer of VPT-Deep at 100%.
        shallow: of VPT-Shallow at 100%.
        keeps: shares of the prompts.
        score_keeps: of them, those at which all scores are compared.
        scopes: of selecting.
        scores: of `pcx.score`, besides "exact".
        exact: whether prompts are really removed, one at a time.
        tune_epochs: of fine-tuning; VPT with fewer prompts trains as many more.
        other_epochs: of fine-tuning, tried at the smallest keep (Fig. 8a).
        shallow_keeps: shares of VPT-Shallow's prompts.
        grid: of every method; all rates themselves.
        rungs: of the searches.
        seeds: how many train each chosen cell.
    """

    prompts: int = 20
    shallow: int = 20
    keeps: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5)
    score_keeps: tuple[float, ...] = (0.1, 0.3)
    scopes: tuple[str, ...] = ("global", "local")
    scores: tuple[str, ...] = ONE_PASS
    exact: bool = True
    tune_epochs: int = 20
    other_epochs: tuple[int, ...] = (1, 5, 10, 40)
    shallow_keeps: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5)
    grid: Grid = Grid((0.01, 0.03, 0.1, 0.3, 1.0, 3.0), (1e-3,), (None, 1.0))  # noqa: RUF009
    rungs: tuple[Rung, ...] = (Rung(1 / 3, 1.0), Rung(1.0, 0.25))
    seeds: int = 3

    def __post_init__(self) -> None:
        for name in ("prompts", "shallow", "tune_epochs", "seeds"):
            whole_number(name, getattr(self, name), 1)
        for keep in (*self.keeps, *self.score_keeps, *self.shallow_keeps):
            real_number("keeps", keep, above=0, most=1, expected="shares in (0, 1]")
        least = math.ceil(0.5 / min((*self.keeps, *self.score_keeps)))
        if self.prompts < least:
            raise ValueError(
                f"prompts: {self.prompts}, of which {100 * min(self.keeps):g}% in each layer are "
                f"none; give {least} or more"
            )
        unknown = [name for name in self.scores if name not in SCORES]
        if unknown:
            raise ValueError(SCORES.unknown(unknown[0]))

    def text(self, kind: str, share: float) -> str:
        """The method's text of a VPT with a share of the prompts."""
        whole = self.prompts if kind == DEEP else self.shallow
        count = max(1, round(share * whole))
        return f"vpt:num_prompts={count}" + ("" if kind == DEEP else f",kind={kind}")

    def shares(self, kind: str) -> tuple[float, ...]:
        """All shares at which a kind is trained, the whole first."""
        return (1.0, *(self.keeps if kind == DEEP else self.shallow_keeps))

    def texts(self) -> list[str]:
        """The texts of all methods that are trained, each once."""
        found = [self.text(kind, s) for kind in KINDS for s in self.shares(kind)]
        return list(dict.fromkeys([LINEAR, *found]))

    def described(self) -> dict[str, Any]:
        """What makes results comparable; further keeps, scores and seeds may be added."""
        return {
            "prompts": self.prompts,
            "shallow": self.shallow,
            "rungs": list(map(list, self.rungs)),
        }


@dataclass(frozen=True)
class PromptSuite:
    """A study of Prompt Condensation on some tasks.

    Attributes:
        name: in `SUITES`.
        title: in a few words.
        tasks: names.
        plan, recipe: of the whole study.
        quick_plan, quick_recipe: of its small form.
    """

    name: str
    title: str
    tasks: tuple[str, ...]
    plan: Plan
    recipe: Recipe
    quick_plan: Plan
    quick_recipe: Recipe

    def run(self, request: Request) -> Results:
        """Runs what is left of the study, and gives its results.

        Raises:
            ValueError: no task can be loaded, an argument does not fit, or the folder is of another
                study.
        """
        plan = replaced(self.quick_plan if request.quick else self.plan, request.plan)
        plan = replaced(plan, {"seeds": request.seeds, "grid": changed(plan.grid, request.changes)})
        recipe = replaced(self.quick_recipe if request.quick else self.recipe, request.recipe)
        tasks, failures = request.loaded(self.tasks)
        spec = find_spec(request.new_backbone(0))
        is_flat = all(block.is_flat for block in spec.blocks)
        if not (spec.has_cls and is_flat):  # [CLS] attends to no prompt, or to some windows' alone
            plan = replaced(plan, {"scores": tuple(s for s in plan.scores if s != OF_CLS)})
        described = {"suite": self.name, **plan.described()}
        with request.opened(tasks, recipe, described) as study:
            found = _Run(study, plan, is_flat).run()
        results = written_up(found, self.name, self.title)
        results.failures = [*failures, *results.failures]
        return results


class _Run:
    """One run of the study, from its searches to its last unit."""

    def __init__(self, study: Study, plan: Plan, is_flat: bool):
        self.study, self.plan, self.is_flat = study, plan, is_flat
        self.is_square = is_flat and OF_CLS in plan.scores
        self.seeds = range(plan.seeds)
        self.chosen: dict[tuple[str, str], Chosen] = {}

    def run(self) -> Gathered:
        """Does all work, stage by stage; a task in which something failed is left out."""
        self._search()
        self._stage(self._trials)
        self._stage(self._scored)
        self._stage(self._condensed)
        self._stage(self._looks)
        self._stage(lambda task: [self._times(task)], alone=True)
        return self._gathered()

    def tasks(self) -> list[str]:
        """Those in which nothing has failed."""
        return [task for task in self.study.setup.tasks if task not in self.study.failed]

    def _search(self) -> None:
        recipe = self.study.setup.recipe
        cells = self.plan.grid.cells(recipe.batch_size)
        searches = [(task, text, cells) for task in self.tasks() for text in self.plan.texts()]
        found = Protocol(self.study, self.plan.rungs).search(searches)
        self.chosen = {
            (task, text): each
            for (task, text, _), each in zip(searches, found, strict=True)
            if each is not None
        }

    def _stage(self, units_of: Callable[[str], Iterable[Unit]], *, alone: bool = False) -> None:
        """Does the units of all tasks that are left; a failed one takes its task out."""
        units: dict[str, list[Unit]] = {task: list(units_of(task)) for task in self.tasks()}
        self.study.finish([unit for each in units.values() for unit in each], alone=alone)
        for task, each in units.items():
            why = self.study.why_failed(each) or self._diverged(each)
            if why is not None:
                self.study.failed[task] = why

    def _diverged(self, units: Sequence[Unit]) -> str | None:
        for unit in units:
            if isinstance(unit, Trial) and self.study.result_of(unit)["diverged"]:
                return f"{unit} diverged on trainval, which it did not on train"
        return None

    def trial(self, task: str, text: str, seed: int) -> Trial:
        """The training on trainval at the chosen cell.

        Only models of all prompts are kept. Those of fewer train as long as they and their
        fine-tuning together, so that neither has more epochs.
        """
        whole = text in [self.plan.text(kind, 1.0) for kind in KINDS]
        more = 0 if whole or text == LINEAR else self.plan.tune_epochs
        epochs = self.study.setup.recipe.epochs + more if more else None
        cell: Cell = self.chosen[task, text].cell
        return Trial(task, text, cell, "trainval", seed, epochs, saved=whole)

    def _trained(self) -> Iterator[tuple[str, str, float | None, str]]:
        """(method, kind, share, text) of all that is trained; shares may have a text in common."""
        yield "linear", "", None, LINEAR
        for kind in KINDS:
            for share in self.plan.shares(kind):
                yield "vpt", kind, share, self.plan.text(kind, share)

    def _trials(self, task: str) -> list[Trial]:
        return [self.trial(task, text, s) for text in self.plan.texts() for s in self.seeds]

    def whole(self, task: str, kind: str, seed: int) -> Trial:
        """The training with all prompts."""
        return self.trial(task, self.plan.text(kind, 1.0), seed)

    def scored(self, task: str, kind: str, seed: int, method: str) -> Scored:
        """The work that gives a score."""
        methods = (EXACT,) if method == EXACT else self.plan.scores if kind == DEEP else (FIRST,)
        return Scored(self.whole(task, kind, seed), methods)

    def methods(self) -> list[str]:
        """The scores that are compared."""
        return [*self.plan.scores, *([EXACT] if self.plan.exact else [])]

    def _scored(self, task: str) -> Iterator[Scored]:
        for seed in self.seeds:
            for method in self.methods():  # several come of the same work
                yield self.scored(task, DEEP, seed, method)
            yield self.scored(task, SHALLOW, seed, FIRST)

    def _condensed(self, task: str) -> Iterator[Condensed]:
        for seed, (kind, case) in itertools.product(self.seeds, self.cases()):
            yield self.condensed(task, kind, seed, **case)

    def condensed(self, task: str, kind: str, seed: int, **case: Any) -> Condensed:
        """The work of one case."""
        return Condensed(self.scored(task, kind, seed, case["method"]), **case)

    def cases(self) -> list[tuple[str, dict[str, Any]]]:
        """(kind, arguments of `Condensed`) of all condensations of a model, each once."""
        plan, found = self.plan, list[tuple[str, str, float, str, int]]()
        tunings = (0, plan.tune_epochs)
        for keep, scope, tuned in itertools.product(plan.keeps, plan.scopes, tunings):
            found.append((DEEP, FIRST, keep, scope, tuned))
        for method, keep, tuned in itertools.product(self.methods(), plan.score_keeps, tunings):
            found.append((DEEP, method, keep, "global", tuned))
            if method == OF_CLS:  # the paper's rival ranks within each layer
                found.append((DEEP, method, keep, "local", tuned))
        for epochs in plan.other_epochs:
            found.append((DEEP, FIRST, min(plan.keeps), "global", epochs))
        for keep, tuned in itertools.product(plan.shallow_keeps, tunings):
            found.append((SHALLOW, FIRST, keep, "global", tuned))
        names = ("method", "keep", "scope", "epochs")
        return [(each[0], dict(zip(names, each[1:], strict=True))) for each in dict.fromkeys(found)]

    def _looks(self, task: str) -> list[Unit]:
        units: list[Unit] = []
        for seed in self.seeds:
            trial = self.whole(task, DEEP, seed)
            units += [WithoutLayers(trial), *([Spectrum(trial)] if self.is_flat else [])]
        return [*units, *self._pictures(task)]

    def _pictures(self, task: str) -> list[Looks]:
        """Of the first seed; none where there is no one attention matrix of all patches."""
        scored = self.scored(task, DEEP, 0, FIRST)
        return [Looks(scored, FIRST, self.plan.score_keeps[-1])] if self.is_square else []

    def _times(self, task: str) -> StageTimes:
        return StageTimes(self.whole(task, DEEP, 0), min(self.plan.keeps))

    def _gathered(self) -> Gathered:
        study, tasks = self.study, self.tasks()
        found = Gathered(self.plan, dict(study.ledger.settings), tasks, list(self.seeds))
        for task, seed in itertools.product(tasks, self.seeds):
            for method, kind, share, text in self._trained():
                trial, chosen = self.trial(task, text, seed), self.chosen[task, text]
                found.add_trained(method, kind, share, trial, study.result_of(trial), chosen)
            for kind, case in self.cases():
                unit = self.condensed(task, kind, seed, **case)
                found.add_condensed(kind, case, task, seed, study.result_of(unit))
            found.scores[task, seed] = {
                m: study.result_of(self.scored(task, DEEP, seed, m))[m] for m in self.methods()
            }
            trial = self.whole(task, DEEP, seed)
            found.without_layers[task, seed] = study.result_of(WithoutLayers(trial))
            if self.is_flat:
                found.spectra[task, seed] = study.result_of(Spectrum(trial))
        for task in tasks:
            found.looks += [study.result_of(each) for each in self._pictures(task)]
            found.times[task] = study.result_of(self._times(task))
        found.failures = [
            (task, why) for task, why in study.failed.items() if task in study.setup.tasks
        ]
        return found


_QUICK = Plan(
    keeps=(0.1, 0.3),
    scores=("taylor", "gate", "cls-attention", "random"),
    other_epochs=(),
    tune_epochs=3,
    shallow_keeps=(0.3,),
    grid=Grid((0.1, 0.3), (1e-3,), (1.0,)),
    rungs=(Rung(1.0, 1.0),),
    seeds=2,
)
_RECIPE = Recipe(epochs=30)

SPRITES = PromptSuite(
    "sprites",
    "Prompt Condensation on three rendered tasks",
    ("sprites:loc", "sprites:ori", "sprites:count"),
    Plan(),
    _RECIPE,
    _QUICK,
    Recipe(epochs=6),
)
DIGITS = PromptSuite(
    "digits",
    "Prompt Condensation on scanned digits",
    ("digits",),
    Plan(),
    _RECIPE,
    _QUICK,
    Recipe(epochs=10),
)
# Every prompt's real removal would take a pass over the images for each of hundreds of prompts.
_LARGE = Plan(prompts=50, shallow=50, exact=False, grid=Grid((0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
              (1e-4, 1e-3), (None, 1.0)))  # fmt: skip
_LARGE_QUICK = replaced(_QUICK, {"prompts": 50, "shallow": 50, "exact": False, "seeds": 1})
VTAB = PromptSuite(
    "vtab",
    "Prompt Condensation on VTAB-1k",
    tuple(f"vtab:{name}" for name in VTAB_CLASSES),
    _LARGE,
    Recipe(epochs=100),
    _LARGE_QUICK,
    Recipe(epochs=10),
)
FGVC = PromptSuite(
    "fgvc",
    "Prompt Condensation on fine-grained images",
    tuple(f"fgvc:{name}" for name in ("CUB", "NABirds", "OxfordFlower", "StanfordCars",
                                      "StanfordDogs")),
    _LARGE,
    Recipe(epochs=100),
    _LARGE_QUICK,
    Recipe(epochs=10),
)  # fmt: skip
