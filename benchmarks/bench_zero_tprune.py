"""Zero-TPrune against other orders of tokens, on the embedded backbone.

`python benchmarks/bench_zero_tprune.py` writes `results/zero_tprune_scenes.csv`: the accuracy on
held-out scenes of the task that the backbone was trained on, at 20, 35 and 50% fewer
multiply-adds, over three seeds of scenes; nothing is trained. Every ranking prunes after the same
layers, with the same similarity stage before it and the same shapes.
`pytest benchmarks/bench_zero_tprune.py` checks that and times a forward.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import pytest
import torch

import pcx
from pcx.backbones import scenes_vit
from pcx.backbones.pretrain import HELD_OUT_SEED, normalise
from pcx.tasks.scenes import NUM_CLASSES, scenes
from pcx.token_pruning.stages import RANKINGS

RESULTS = Path(__file__).parent / "results"
LAYERS, ITERS, SIMILAR = (1, 2, 3, 4), (30, 5, 5, 1), 2
CUTS = (0.20, 0.35, 0.50)
SEEDS = (HELD_OUT_SEED, HELD_OUT_SEED + 1, HELD_OUT_SEED + 2)
BATCHES, BATCH = 10, 512
FIELDS = ["ranking", "cut", "keep", "patches", "mmacs", "seed", "accuracy", "images", "torch"]


def prune(model: torch.nn.Module, keep: float, ranking: str) -> pcx.token_pruning.Pruning:
    return pcx.zero_tprune(
        model, layers=LAYERS, keep=keep, iters=ITERS, similar=SIMILAR, ranking=ranking
    )


def keep_for(cut: float) -> float:
    """The share that leaves the most tokens at no more than so many multiply-adds."""
    model = scenes_vit(NUM_CLASSES)
    whole = pcx.multiply_adds(model)
    for percent in range(100, 0, -1):
        prune(model, percent / 100, "random")
        if pcx.multiply_adds(model) <= (1 - cut) * whole:
            return percent / 100
    raise ValueError(f"cut: {cut} cannot be reached")


@torch.no_grad()
def accuracy(model: torch.nn.Module, seed: int) -> float:
    """Percent of held-out scenes."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # of "random"
    right = 0
    for _ in range(BATCHES):
        images, labels = scenes(BATCH, generator)
        right += int((model(normalise(images)).argmax(1) == labels).sum())
    return 100 * right / (BATCHES * BATCH)


def measure():
    model = scenes_vit(NUM_CLASSES)
    for cut in (0.0, *CUTS):
        keep = keep_for(cut) if cut else 1.0
        for ranking in RANKINGS if cut else ("none",):
            pruning = prune(model, keep, ranking) if cut else None
            mmacs = pcx.multiply_adds(model) / 1e6
            patches = [k.shape[1] - 1 for k in pruning.kept] if pruning else [64]
            for seed in SEEDS:
                row = {
                    "ranking": ranking,
                    "cut": cut,
                    "keep": keep,
                    "patches": " ".join(map(str, patches)),
                    "mmacs": round(mmacs, 2),
                    "seed": seed,
                    "accuracy": round(accuracy(model, seed), 2),
                    "images": BATCHES * BATCH,
                    "torch": torch.__version__,
                }
                print(*row.values(), flush=True)
                yield row


@pytest.fixture(scope="module")
def images():
    return normalise(scenes(64, torch.Generator().manual_seed(HELD_OUT_SEED))[0])


@pytest.mark.parametrize("ranking", ["none", *RANKINGS])
def test_a_forward(benchmark, ranking, images):
    model = scenes_vit(NUM_CLASSES)
    if ranking != "none":
        pruning = prune(model, 0.8, ranking)
        with torch.no_grad():
            model(images)
        sizes = [k.shape for k in pruning.kept]
        assert sizes == [(64, 51), (64, 39), (64, 30), (64, 23)]
    with torch.no_grad():
        benchmark.pedantic(model, (images,), rounds=5, warmup_rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    with open(parser.parse_args().out / "zero_tprune_scenes.csv", "w", newline="") as output:
        writer = csv.DictWriter(output, FIELDS)
        writer.writeheader()
        writer.writerows(measure())


if __name__ == "__main__":
    main()
