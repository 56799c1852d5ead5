"""What training after pruning gains: `python benchmarks/zero_tprune_finetune.py`.

Writes `results/zero_tprune_finetune.csv`: the accuracy on the test digits of a VPT over the
embedded backbone, whole and at 35% fewer multiply-adds, before and after a few more epochs, over
three seeds. Besides the soft masks stand their two simplest rivals, of as many epochs with the same
optimiser and learning rate: training with tokens really dropped, and training the whole model. No
setting is searched for.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_zero_tprune import multiply_adds
from machine import cpu_name

import pcx
from pcx.backbones import scenes_vit
from pcx.data import data_config
from pcx.tasks import Task, load_task
from pcx.token_pruning import finetune

RESULTS = Path(__file__).parent / "results"
LAYERS, ITERS, CUT = (1, 2, 3, 4), (30, 5, 5, 1), 0.35
PROMPTS, EPOCHS, RATE = 20, 15, 0.3
MORE_EPOCHS, MORE_RATE = 6, 0.1
SEEDS = (0, 1, 2)
OPTIMISER: dict[str, Any] = {"opt": "sgd", "clip_grad": 1.0, "progress": False}


def setting(model: pcx.VPT) -> dict[str, Any]:
    """The share of patches to keep that leaves the most at no more than so many multiply-adds."""
    small = copied(model).requires_grad_(False)
    whole = multiply_adds(small)
    for percent in range(100, 0, -1):
        found = {"layers": LAYERS, "iters": ITERS, "keep": percent / 100}
        pcx.zero_tprune(small, **found)
        if multiply_adds(small) <= (1 - CUT) * whole:
            return found
    raise ValueError(f"CUT: {CUT} cannot be reached")


def copied(model: pcx.VPT) -> pcx.VPT:
    return model.keep([range(count) for count in model.counts])


def accuracy(model: pcx.VPT, test, pruned: dict[str, Any] | None) -> float:
    pruning = None if pruned is None else pcx.zero_tprune(model, **pruned)
    found = pcx.evaluate(model, test)["accuracy"]
    if pruning is not None:
        pruning.remove()
    return found


def trainings(task: Task, how: dict[str, Any], seed: int) -> dict[str, Callable[[pcx.VPT], Any]]:
    train = task.loader("trainval", 32)
    more = {"epochs": MORE_EPOCHS, "lr": MORE_RATE, "seed": seed, **OPTIMISER}

    def dropping(model: pcx.VPT) -> None:
        pruning = pcx.zero_tprune(model, **how)
        pcx.fit(model, train, warmup_epochs=0, **more)
        pruning.remove()

    return {
        "none": lambda model: None,
        "soft masks": lambda model: finetune(model, train, **how, **more),
        "tokens dropped": dropping,
        "whole": lambda model: pcx.fit(model, train, warmup_epochs=0, **more),
    }


def measure(seed: int):
    task = load_task("digits", data_config(scenes_vit()))
    test = task.loader("test", 256)
    torch.manual_seed(seed)
    model = pcx.VPT(scenes_vit(task.num_classes), PROMPTS, head_init="keep")
    pcx.fit(model, task.loader("trainval", 32), epochs=EPOCHS, lr=RATE, seed=seed, **OPTIMISER)
    how = setting(model)
    for name, train in trainings(task, how, seed).items():
        trained = copied(model)
        train(trained)
        row = {
            "seed": seed,
            "training_after": name,
            "epochs": MORE_EPOCHS if name != "none" else 0,
            "accuracy_whole": round(accuracy(trained, test, None), 2),
            "accuracy_pruned": round(accuracy(trained, test, how), 2),
            "keep": how["keep"],
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
