"""The command `pcx study`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

import typer

from pcx.cli import grid_options as grid
from pcx.cli import options as o
from pcx.experiments.suites import SUITES
from pcx.models import HEAD_INITS

PLAN = "Plan"


def study(
    suite: Annotated[str, typer.Option(help=f"one of {', '.join(SUITES)}")],
    task: Annotated[
        list[str] | None,
        o.option("in place of the suite's tasks; may be given several times", o.DATA, "--task"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="folder for results, by default runs/<suite>; what is finished in it stays"
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="a small form of the suite")] = False,
    backbone: o.Backbone = o.EMBEDDED,
    weights: o.Weights = None,
    prompts: Annotated[
        int | None, o.option("of each layer of VPT-Deep, and of VPT-Shallow, at 100%", PLAN)
    ] = None,
    tune_epochs: Annotated[int | None, o.option("of fine-tuning condensed prompts", PLAN)] = None,
    seeds: Annotated[int | None, o.option("trainings of each chosen setting", PLAN)] = None,
    epochs: Annotated[int | None, o.option("passes over the training data", PLAN)] = None,
    batch_size: Annotated[int | None, o.option("images in a batch", PLAN)] = None,
    head_init: Annotated[str | None, o.option(", ".join(HEAD_INITS), PLAN)] = None,
    grid_lr: grid.Rates = None,
    grid_weight_decay: grid.Decays = None,
    grid_clip_grad: grid.Clips = None,
    grid_opt: grid.Opt = None,
    processes: Annotated[int, o.option("how many work at the same time", o.RUN)] = 1,
    storage: o.Storage = None,
    root: o.Root = None,
    amp: o.Amp = "no",
    execution: o.Execution = "auto",
    workers: o.Workers = 0,
    cache: o.Cache = None,
    config: o.Config = None,
) -> None:
    """Runs a suite: the papers' findings by one command.

    It goes on where it was stopped, and several processes and machines may share it. A task that
    fails is left out and named, and the exit code is then 1.
    """
    from pcx.experiments.request import Request
    from pcx.extras import need

    for package in ("matplotlib", "scipy", "optuna"):
        need(package, "pcx study")
    chosen = SUITES.get_checked(suite)
    folder = Path("runs") / suite if out is None else out
    recipe: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "head_init": head_init}
    recipe |= {"amp": amp, "execution": execution, "num_workers": workers}
    settings = o.backbone_data_config(backbone, weights)
    found = chosen.run(
        Request(
            out=folder,
            new_backbone=functools.partial(o.new_backbone, backbone, weights=weights),
            load=lambda name: o.new_task(name, settings, root, cache),
            tasks=None if task is None else tuple(task),
            quick=quick,
            seeds=seeds,
            recipe=recipe,
            changes=grid.grid_changes(grid_lr, grid_weight_decay, grid_clip_grad, grid_opt),
            plan={"prompts": prompts, "shallow": prompts, "tune_epochs": tune_epochs},
            processes=processes,
            storage=storage,
            say=o.say,
        )
    )
    found.write(folder)
    for finding in found.findings:
        half = "" if finding.half is None else f" ± {finding.half:.3g}"
        o.say(f"{finding.verdict()}: {finding.says} ({finding.value:+.3g}{half} {finding.unit})")
    for what, why in found.failures:
        o.say(f"failed: {what}: {why}")
    o.say(f"wrote {folder / 'results.csv'}, results.json and figures")
    if found.failures:
        raise typer.Exit(1)
