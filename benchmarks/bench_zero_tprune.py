"""Benchmark of Zero-TPrune against other orders of tokens, ToMe and ATS, on the embedded backbone.

`python benchmarks/bench_zero_tprune.py` writes `results/zero_tprune_scenes.csv`: the accuracy on
held-out scenes of the task that the backbone was trained on, at 20, 35 and 50% fewer
multiply-adds, over three seeds of scenes. Nothing is trained.

Every ranking prunes after the same layers, with the same similarity stage and the same shapes. ATS
samples a share of its slots after those layers. The layers are those from the first on, with the
paper's iterations, or a third and two thirds of all. ToMe merges equally many pairs after every
layer but the last.

`pytest benchmarks/bench_zero_tprune.py` checks that and times a forward.
"""

from __future__ import annotations

import argparse
import csv
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import pcx
from pcx.backbones import scenes_vit
from pcx.experiments.pretrain import HELD_OUT_SEED, normalise
from pcx.tasks.scenes import NUM_CLASSES, scenes
from pcx.token_pruning import ats, tome
from pcx.token_pruning.stages import RANKINGS

RESULTS = Path(__file__).parent / "results"
PATCHES = 64  # patches of a scene
# The pruning layers, of six, and the PageRank iterations in each.
LAYERS = {"1 2 3 4": (30, 5, 5, 1), "2 4": (5, 5)}
EVERY = "1 2 3 4 5"  # the layers after which ToMe merges
SIMILAR = 2
CUTS = (0.20, 0.35, 0.50)
SEEDS = (HELD_OUT_SEED, HELD_OUT_SEED + 1, HELD_OUT_SEED + 2)
BATCHES, BATCH = 10, 512
FIELDS = [
    "method",
    "layers",
    "cut",
    "setting",
    "patches",
    "mmacs",
    "seed",
    "accuracy",
    "images",
    "torch",
]


def set_up(model: torch.nn.Module, method: str, layers: str, setting: float) -> Any:
    """Sets a method up by its cut: the share of patches to keep or slots to sample, or ToMe's r."""
    if method == "tome":
        return tome(model, r=int(setting))
    after = [int(layer) for layer in layers.split()]
    if method == "ats":
        tokens = [PATCHES]
        for _ in after:
            tokens.append(max(1, round(setting * tokens[-1])))
        return ats(model, layers=after, tokens=tokens[1:])
    return pcx.zero_tprune(
        model, layers=after, keep=setting, iters=LAYERS[layers], similar=SIMILAR, ranking=method
    )


def patches_left(handle: Any) -> list[int]:
    """The patches left after each layer that drops or merges some, or the slots of ATS."""
    left = [merged.sizes for merged in handle.merged] if hasattr(handle, "merged") else handle.kept
    return [tokens.shape[1] - handle.prefix_tokens for tokens in left]


@cache
def setting_for(method: str, layers: str, cut: float) -> float:
    """The cut that leaves the most tokens at no more than so many multiply-adds."""
    model = scenes_vit(NUM_CLASSES)
    whole = pcx.multiply_adds(model)
    shares = [percent / 100 for percent in range(100, 0, -1)]
    for setting in range(1, PATCHES) if method == "tome" else shares:
        set_up(model, method, layers, setting)
        if pcx.multiply_adds(model) <= (1 - cut) * whole:
            return setting
    raise ValueError(f"cut: {cut} cannot be reached")


@cache
def held_out(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [scenes(BATCH, generator) for _ in range(BATCHES)]


@torch.no_grad()
def accuracy(model: torch.nn.Module, seed: int) -> float:
    """Accuracy on held-out scenes, percent."""
    torch.manual_seed(seed)  # for the ranking "random"
    right = 0
    for images, labels in held_out(seed):
        right += int((model(normalise(images)).argmax(1) == labels).sum())
    return 100 * right / (BATCHES * BATCH)


def cases():
    """All cases (method, layers, cut)."""
    yield "none", "", 0.0
    for cut in CUTS:
        for layers in LAYERS:
            for method in (*RANKINGS, "ats"):
                yield method, layers, cut
        yield "tome", EVERY, cut


def measure():
    model = scenes_vit(NUM_CLASSES)
    for method, layers, cut in cases():
        counted = "random" if method in RANKINGS else method  # one setting for all rankings
        setting = setting_for(counted, layers, cut) if cut else 1.0
        handle = set_up(model, method, layers, setting) if cut else None
        mmacs = pcx.multiply_adds(model) / 1e6
        for seed in SEEDS:
            found = accuracy(model, seed)
            patches = patches_left(handle) if handle else [PATCHES]
            row = {
                "method": method,
                "layers": layers,
                "cut": cut,
                "setting": setting,
                "patches": " ".join(map(str, patches)),
                "mmacs": round(mmacs, 2),
                "seed": seed,
                "accuracy": round(found, 2),
                "images": BATCHES * BATCH,
                "torch": torch.__version__,
            }
            print(*row.values(), flush=True)
            yield row


@pytest.fixture(scope="module")
def images():
    return normalise(scenes(64, torch.Generator().manual_seed(HELD_OUT_SEED))[0])


LEFT = {
    "1 2 3 4": {"ats": [51, 41, 33, 26], "rankings": [50, 38, 29, 22]},
    "2 4": {"ats": [51, 41], "rankings": [50, 38]},
    EVERY: {"tome": [58, 52, 46, 40, 34]},
}


@pytest.mark.parametrize(
    ("method", "layers"),
    [("none", ""), ("tome", EVERY), *((m, at) for at in LAYERS for m in (*RANKINGS, "ats"))],
)
def test_a_forward(benchmark, method, layers, images):
    model = scenes_vit(NUM_CLASSES)
    if method != "none":
        handle = set_up(model, method, layers, 6 if method == "tome" else 0.8)
        with torch.no_grad():
            model(images)
        assert patches_left(handle) == LEFT[layers]["rankings" if method in RANKINGS else method]
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
