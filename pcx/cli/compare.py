"""The command `pcx compare`."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pcx.cli import grid_options as grid
from pcx.cli import options as o
from pcx.models import HEAD_INITS, METHODS

TaskNames = Annotated[
    list[str],
    o.option("as pcx train has it; may be given several times", o.DATA, "--task"),
]
Texts = Annotated[
    list[str] | None,
    typer.Option(
        "--method", help="with arguments, as vpt:num_prompts=10,kind=shallow; several times"
    ),
]
Names = Annotated[
    str | None, typer.Option(help=f"names alone, as linear,vpt; of {', '.join(METHODS)}")
]


def compare(
    task: TaskNames,
    method: Texts = None,
    methods: Names = None,
    out: Annotated[
        Path, typer.Option(help="folder for results; what is finished in it is not repeated")
    ] = Path("runs/compare"),
    backbone: o.Backbone = o.EMBEDDED,
    weights: o.Weights = None,
    seeds: Annotated[
        int, o.option("trainings of each chosen setting, of seeds 0 and on", o.OPTIMISATION)
    ] = 3,
    epochs: o.Epochs = 100,
    batch_size: o.BatchSize = 64,
    head_init: Annotated[str, typer.Option(help=", ".join(HEAD_INITS))] = HEAD_INITS[0],
    grid_lr: grid.Rates = None,
    grid_weight_decay: grid.Decays = None,
    grid_clip_grad: grid.Clips = None,
    grid_opt: grid.Opt = None,
    processes: Annotated[
        int, o.option("how many train at the same time; each first seed runs alone", o.RUN)
    ] = 1,
    storage: o.Storage = None,
    root: o.Root = None,
    amp: o.Amp = "no",
    execution: o.Execution = "auto",
    workers: o.Workers = 0,
    cache: o.Cache = None,
    config: o.Config = None,
) -> None:
    """Compares methods on tasks, each at its best by val, and tests several seeds once each."""
    from pcx.experiments.compare import compare as compare_methods
    from pcx.experiments.reports import remarks, table, write_reports
    from pcx.experiments.trials import Recipe
    from pcx.extras import need

    need("matplotlib", "pcx compare")
    chosen = _texts(method, methods)
    changes = grid.grid_changes(grid_lr, grid_weight_decay, grid_clip_grad, grid_opt)
    found = compare_methods(
        _tasks(task, o.backbone_data_config(backbone, weights), root, cache),
        chosen,
        functools.partial(o.new_backbone, backbone, weights=weights),
        out,
        recipe=Recipe(epochs, batch_size, amp, execution, head_init, workers),
        seeds=seeds,
        changes=changes,
        processes=processes,
        storage=storage,
        say=o.say,
    )
    write_reports(found, out)
    Console(width=None if sys.stdout.isatty() else 200).print(table(found))
    for said in remarks(found):
        o.say(said)
    o.say(f"wrote {out / 'compare.csv'}, compare.md and compare.png")


def _texts(texts: list[str] | None, names: str | None) -> list[str]:
    """The texts of both options, those of --methods first."""
    plain = [name.strip() for name in names.split(",")] if names is not None else []
    dressed = [name for name in plain if ":" in name or "=" in name]
    if dressed:
        raise ValueError(
            f"--methods: {dressed[0]!r} has arguments, and --methods takes names alone; give it "
            "by --method"
        )
    found = [*plain, *(texts or [])]
    if not found:
        raise ValueError("--methods: got none; give --methods linear,vpt, or --method")
    return found


def _tasks(names: list[str], settings: dict, root: Path | None, cache: Path | None) -> dict:
    """The tasks by name; a folder of photos has its own name, without the folders around it."""
    found: dict[str, Any] = {}
    for name in names:
        task = o.new_task(name, settings, root, cache)
        if task.name in found:
            raise ValueError(f"--task: {task.name} is given twice; leave one out")
        found[task.name] = task
    return found
