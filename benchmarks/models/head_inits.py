"""How a new head starts, and how far a VPT of the embedded backbone then comes.

`python benchmarks/models/head_inits.py` trains two tasks with each of `head_init`'s ways, in short
and long trainings, with three seeds, and writes `results/head_inits.csv`: the first loss and the
test accuracy. Rates are those that pcx's own programs use and their neighbours; none is chosen by
its result. With 14 processes it takes a GPU 4 minutes, and two CPU cores several hours. `--quick`
runs two epochs of one task and checks that what comes out is sound, without a file.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import pcx
from pcx.backbones import scenes_vit
from pcx.backbones.inputs import data_config
from pcx.models import HEAD_INITS
from pcx.tasks import load_task

FILE = Path(__file__).parents[1] / "results" / "head_inits.csv"
TASKS, EPOCHS, SEEDS = ("digits", "sprites:ori"), (12, 100), (0, 1, 2)
SETTINGS: tuple[dict[str, Any], ...] = (
    {"opt": "momentum", "lr": 0.03, "clip_grad": None},
    {"opt": "momentum", "lr": 0.3, "clip_grad": None},
    {"opt": "momentum", "lr": 0.3, "clip_grad": 1.0},
    {"opt": "adamw", "lr": 0.001, "clip_grad": None},
    {"opt": "adamw", "lr": 0.01, "clip_grad": None},
)


def trained(job: tuple[str, str, int, dict[str, Any], int]) -> dict[str, Any]:
    """One training's row."""
    torch.set_num_threads(1)
    name, init, epochs, settings, seed = job
    task = load_task(name, data_config(scenes_vit()))
    torch.manual_seed(seed)
    model = pcx.VPT(scenes_vit(), 20, num_classes=task.num_classes, head_init=init)
    train, test = task.loader("train"), task.loader("test", 256)
    first = pcx.evaluate(model, train)["loss"]
    row = {"task": name, "head_init": init, "epochs": epochs, **settings, "seed": seed}
    row |= {"chance_loss": math.log(task.num_classes), "first_loss": first}
    try:
        pcx.fit(model, train, epochs=epochs, seed=seed, progress=False, **settings)
    except pcx.NonFiniteLoss:
        return row | {"accuracy": None}
    return row | {"accuracy": pcx.evaluate(model, test)["accuracy"]}


def rows_of(jobs: Iterable[Any], processes: int) -> list[dict[str, Any]]:
    """All rows, in the order of the jobs; the long ones are begun first."""
    jobs = list(jobs)
    order = sorted(range(len(jobs)), key=lambda i: -jobs[i][2])
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        found = {i: pool.submit(trained, jobs[i]) for i in order}
        return [found[i].result() for i in range(len(jobs))]


def check(rows: list[dict[str, Any]]) -> None:
    """Raises an AssertionError where the default does not start at chance, or nothing is learnt."""
    for row in rows:
        if row["head_init"] == HEAD_INITS[0]:
            assert row["first_loss"] < 1.2 * row["chance_loss"], row
        assert row["accuracy"] is None or 0 < row["accuracy"] <= 100, row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args()
    grid = (TASKS, HEAD_INITS, EPOCHS, SETTINGS, SEEDS)
    jobs = itertools.product(*grid)
    if options.quick:
        jobs = itertools.product(TASKS[:1], HEAD_INITS, (2,), SETTINGS[:1], SEEDS[:1])
    rows = rows_of(jobs, options.processes)
    check(rows)
    if options.quick:
        print(*rows, sep="\n")
        return
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})


if __name__ == "__main__":
    main()
