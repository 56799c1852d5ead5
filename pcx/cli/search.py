"""The command `pcx search`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from pcx.cli import options as o
from pcx.extras import need


def search(
    model: o.ModelFile,
    budget: Annotated[float, typer.Option(help="share of the multiply-adds, or a number of them")],
    photos: o.Photos = None,
    task: o.TaskName = None,
    trials: Annotated[
        int, typer.Option(help="number of settings to evaluate on the split val")
    ] = 100,
    images: Annotated[
        int, typer.Option(help="number of images of val, the same for all settings")
    ] = 1024,
    ranking: o.Ranking = "pagerank",
    storage: o.Storage = None,
    backbone: o.FileBackbone = None,
    weights: o.Weights = None,
    split: Annotated[
        str | None,
        o.option("split on which the best setting is evaluated; by default test, or val", o.DATA),
    ] = None,
    batch_size: o.BatchSize = 64,
    root: o.Root = None,
    amp: o.Amp = "no",
    execution: o.Execution = "auto",
    seed: o.Seed = 0,
    workers: o.Workers = 0,
    cache: o.Cache = None,
    config: o.Config = None,
) -> None:
    """Searches settings of pcx prune at a budget, and evaluates the best (Zero-TPrune, 4.1)."""
    need("optuna", "pcx search")
    import optuna

    from pcx.token_pruning.budget_search import search as search_settings
    from pcx.token_pruning.dropping import zero_tprune

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # the progress bar shows the same
    name = o.one_task(photos, task)
    loaded = o.loaded_model(model, backbone, weights).eval()
    data = o.task_for(loaded, name, root, cache)
    found = search_settings(
        loaded,
        data.loader("val", batch_size, num_workers=workers),
        budget=budget,
        trials=trials,
        images=images,
        seed=seed,
        fixed={"ranking": ranking, "cls_boost": loaded.spec.has_cls},
        storage=storage,
        amp=amp,
        execution=execution,
    )
    options = {name: found.best[name] for name in ("layers", "keep", "iters", "similar")}
    said = " ".join(f"--{name} {','.join(map(str, values))}" for name, values in options.items())
    Console(soft_wrap=True).print(f"pcx prune {said} --ranking {ranking}", highlight=False)
    o.say_accuracy(loaded, data, batch_size, amp, split, workers)
    zero_tprune(loaded, **found.best)
    o.say("pruned:")
    o.say_accuracy(loaded, data, batch_size, amp, split, workers)
