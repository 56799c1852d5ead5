"""Measures the gain of training for pruning: `python benchmarks/zero_tprune_finetune.py`.

It writes `results/zero_tprune_finetune.csv`: the accuracy on the test digits of a VPT over the
embedded backbone, whole and at 38% fewer multiply-adds, before and after a few more epochs, over
three seeds. Soft masks are compared with their two simplest rivals: training with tokens really
dropped, and training the whole model. All have as many epochs, the same optimiser and the same
learning rate. No setting is searched for.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import cpu_name

import pcx
from pcx.backbones import scenes_vit
from pcx.backbones.inputs import data_config
from pcx.tasks import Task, load_task
from pcx.token_pruning import finetune

RESULTS = Path(__file__).parent / "results"
SETTING: dict[str, Any] = {"layers": (1, 2, 3, 4), "keep": 0.77, "iters": (30, 5, 5, 1)}
PROMPTS, EPOCHS, RATE = 20, 15, 0.3
MORE_EPOCHS, MORE_RATE = 6, 0.1
SEEDS = (0, 1, 2)
OPTIMISER: dict[str, Any] = {"opt": "sgd", "clip_grad": 1.0, "progress": False}


def check_cut(model: pcx.VPT) -> None:
    whole = pcx.multiply_adds(model)
    pcx.zero_tprune(model, **SETTING)
    assert abs(1 - pcx.multiply_adds(model) / whole - 0.38) < 0.005


def accuracy(model: pcx.VPT, test, pruned: dict[str, Any] | None) -> float:
    pruning = None if pruned is None else pcx.zero_tprune(model, **pruned)
    found = pcx.evaluate(model, test)["accuracy"]
    if pruning is not None:
        pruning.remove()
    return found


def trainings(task: Task, seed: int) -> dict[str, Callable[[pcx.VPT], Any]]:
    train = task.loader("trainval", 32)
    more = {"epochs": MORE_EPOCHS, "lr": MORE_RATE, "seed": seed, **OPTIMISER}

    def dropping(model: pcx.VPT) -> None:
        pruning = pcx.zero_tprune(model, **SETTING)
        pcx.fit(model, train, warmup_epochs=0, **more)
        pruning.remove()

    return {
        "none": lambda model: None,
        "soft masks": lambda model: finetune(model, train, **SETTING, **more),
        "tokens dropped": dropping,
        "whole": lambda model: pcx.fit(model, train, warmup_epochs=0, **more),
    }


def measure(seed: int):
    task = load_task("digits", data_config(scenes_vit()))
    test = task.loader("test", 256)
    torch.manual_seed(seed)
    model = pcx.VPT(scenes_vit(task.num_classes), PROMPTS, head_init="keep")
    pcx.fit(model, task.loader("trainval", 32), epochs=EPOCHS, lr=RATE, seed=seed, **OPTIMISER)
    check_cut(model.copy())
    for name, train in trainings(task, seed).items():
        trained = model.copy()
        train(trained)
        row = {
            "seed": seed,
            "training_after": name,
            "epochs": MORE_EPOCHS if name != "none" else 0,
            "accuracy_whole": round(accuracy(trained, test, None), 2),
            "accuracy_pruned": round(accuracy(trained, test, SETTING), 2),
            "keep": SETTING["keep"],
            "test_images": len(test.dataset),
            "threads": torch.get_num_threads(),
            "cpu": cpu_name(),
            "torch": torch.__version__,
        }
        print(*row.values(), flush=True)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    folder = parser.parse_args().out
    rows = [row for seed in SEEDS for row in measure(seed)]
    with open(folder / "zero_tprune_finetune.csv", "w", newline="") as output:
        writer = csv.DictWriter(output, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
