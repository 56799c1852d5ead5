"""Benchmark of searched settings of Zero-TPrune against a fixed one, on the embedded backbone.

`python benchmarks/zero_tprune_search.py` writes `results/zero_tprune_search.csv`. The settings have
65% of the multiply-adds. They are searched on scenes of three seeds and evaluated on held-out
scenes of three others; nothing is trained. The fixed setting is that of `bench_zero_tprune.py` at
this cut. Random dropping is searched too, since the places of dropping matter for any order.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import pcx
from pcx.backbones import scenes_vit
from pcx.experiments.pretrain import HELD_OUT_SEED, normalise
from pcx.tasks.scenes import NUM_CLASSES, scenes

FILE = Path(__file__).parent / "results" / "zero_tprune_search.csv"
BUDGET, TRIALS, IMAGES = 0.65, 20, 512
FIXED = {"layers": (1, 2, 3, 4), "keep": 0.85, "iters": (30, 5, 5, 1), "similar": 2}
RANKINGS = ("pagerank", "random")
SEEDS = (0, 1, 2)
SEARCH_SEED, BATCHES, BATCH = 100, 10, 512


def loader(seed: int, batches: int) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    images, labels = zip(*(scenes(BATCH, generator) for _ in range(batches)), strict=True)
    return DataLoader(TensorDataset(normalise(torch.cat(images)), torch.cat(labels)), BATCH)


def row(seed: int, held_out: DataLoader, arguments: dict, **said: Any) -> dict:
    model = scenes_vit(NUM_CLASSES)
    if arguments:
        pcx.zero_tprune(model, **arguments)
    torch.manual_seed(seed)  # for the ranking "random"
    columns = {name: arguments.get(name, "") for name in FIXED}
    found = {
        **said,
        "seed": seed,
        **{name: str(value).strip("()").replace(",", "") for name, value in columns.items()},
        "mmacs": round(pcx.multiply_adds(model) / 1e6, 2),
        "accuracy": round(pcx.evaluate(model, held_out)["accuracy"], 2),
        "images": BATCHES * BATCH,
        "torch": torch.__version__,
    }
    print(*found.values(), flush=True)
    return found


def measure() -> Iterator[dict]:
    for seed in SEEDS:
        held_out = loader(HELD_OUT_SEED + seed, BATCHES)
        yield row(seed, held_out, {}, setting="none", ranking="none", on_searched="")
        for ranking in RANKINGS:
            fixed = {**FIXED, "ranking": ranking}
            yield row(seed, held_out, fixed, setting="fixed", ranking=ranking, on_searched="")
            found = pcx.token_pruning.search(
                scenes_vit(NUM_CLASSES),
                loader(SEARCH_SEED + seed, IMAGES // BATCH),
                budget=BUDGET,
                trials=TRIALS,
                images=IMAGES,
                seed=seed,
                fixed={"ranking": ranking},
            )
            on_searched = round(found.accuracy, 2)
            said = {"setting": f"best of {TRIALS}", "ranking": ranking, "on_searched": on_searched}
            yield row(seed, held_out, found.best, **said)


if __name__ == "__main__":
    table = list(measure())
    with open(FILE, "w", newline="") as output:
        writer = csv.DictWriter(output, table[0])
        writer.writeheader()
        writer.writerows(table)
