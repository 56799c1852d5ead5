"""A study of prompts on tiny tasks."""

from tiny_tasks import tiny_backbone, tiny_task

from pcx.experiments.grids import Grid
from pcx.experiments.protocol import Rung
from pcx.experiments.request import Request
from pcx.experiments.suites.prompts import Plan, PromptSuite
from pcx.experiments.trials import Recipe

PLAN = Plan(
    prompts=4,
    shallow=4,
    keeps=(0.25, 0.5),
    score_keeps=(0.25,),
    tune_epochs=1,
    other_epochs=(2,),
    shallow_keeps=(0.5,),
    grid=Grid((0.01, 0.1), (0.0,), (1.0,)),
    rungs=(Rung(1.0, 1.0),),
    seeds=2,
)
TINY = PromptSuite(
    "tiny", "A tiny study", ("tiny:a", "tiny:b"), PLAN, Recipe(epochs=2, batch_size=6), PLAN,
    Recipe(epochs=1, batch_size=6),
)  # fmt: skip


def asked(folder, **more):
    more = {"load": tiny_task, "say": lambda line: None, **more}
    return Request(folder, tiny_backbone, **more)
