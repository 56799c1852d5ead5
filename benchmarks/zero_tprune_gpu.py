"""Times pruned DeiT-S on a GPU, in images a second: `python benchmarks/zero_tprune_gpu.py`.

It writes `results/zero_tprune_<gpu>.csv`: DeiT-S with random weights, batches of 512 images,
bfloat16, compiled and eager, each in a CUDA graph. The forms are the whole model ("plain"),
Zero-TPrune with the settings of `pcx.token_pruning` ("a", "b", "c" and the paper's Table 1), and
random dropping. The latter has the same shapes after every layer and no similarity stage. Each form
is timed in turns with the whole model; "against_plain" is the median of the turns' ratios. Rows
that are already there are not measured again.

No pruning changes the patch embedding. Its convolution of three channels equals a matrix product,
which is faster by a tenth of the whole model's time. All forms therefore have it as a product
("embedding"). "a" is timed with timm's convolution too, channels last and with cuDNN's benchmark.
"""

from __future__ import annotations

import argparse
import csv
import sys
from functools import cache
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import pcx
from pcx.backbones.patches import PatchProduct
from pcx.token_pruning import TABLE_1, VARIANTS

sys.path.insert(0, str(Path(__file__).parent))
from gpu_timing import graph_of, quantiles, table

RESULTS = Path(__file__).parent / "results"
MODEL, BATCH, PATCHES = "deit_small_patch16_224", 512, 196
SETTINGS = {**VARIANTS, "table 1": TABLE_1}
CASES = [  # the compiled ones first
    (setting, mode, embedding)
    for mode in ("compiled", "eager")
    for embedding, settings in {"product": SETTINGS, "convolution": ["a"]}.items()
    for setting in settings
]
FIELDS = (
    "model setting form mode embedding batch dtype gmacs patches ms_median ms_q1 ms_q3 "
    "images_per_s against_plain gpu torch timm"
)
TURNS = 7


def deit(embedding: str = "product") -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(MODEL).cuda().eval().to(torch.bfloat16)
    if embedding == "convolution":
        return model.to(memory_format=torch.channels_last)
    model.patch_embed.proj = PatchProduct(model.patch_embed.proj)
    return model


def images_for(embedding: str) -> Tensor:
    images = torch.randn(BATCH, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
    if embedding == "convolution":
        return images.to(memory_format=torch.channels_last)
    return images


@cache  # used by random dropping and by the rows
def left_by(setting: str) -> list[int]:
    """The number of patches at first, and after each pruning layer."""
    left = [PATCHES]
    for step in pcx.zero_tprune(deit(), **SETTINGS[setting]).steps:
        left.append(step.left(left[-1]))
    return left


def build(setting: str, form: str, embedding: str = "product") -> nn.Module:
    model = deit(embedding)
    if form == "pagerank":
        pcx.zero_tprune(model, **SETTINGS[setting])
    if form == "random":
        left, layers = left_by(setting), SETTINGS[setting]["layers"]
        keep = [after / before for before, after in zip(left, left[1:], strict=False)]
        pcx.zero_tprune(model, layers=layers, keep=keep, iters=1, ranking="random")
    return model


def check_embedding() -> None:
    """Checks that the product equals the convolution."""
    images = images_for("product")[:8]
    found, expected = (deit(e).patch_embed(images) for e in ("product", "convolution"))
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


@cache  # checked once per setting
def check(setting: str) -> None:
    """Checks on a few images in float32 that the kernels keep the tokens that the reference keeps.

    Scores that are equal up to rounding may differ, and what follows from them.
    """
    settings = SETTINGS[setting]
    model = deit().float()
    images = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    kept = []
    for device in ("cuda", "cpu"):
        pruning = pcx.zero_tprune(model.to(device), **settings)
        with torch.no_grad():
            model(images.to(device))
        kept.append([places.cpu() for places in pruning.kept])
    for ours, expected in zip(*kept, strict=True):
        assert ours.shape == expected.shape
        for a, b in zip(ours.tolist(), expected.tolist(), strict=True):
            assert len(set(a) & set(b)) >= 0.95 * len(a)


def replay_of(model: nn.Module, mode: str, images: Tensor):
    """A function that runs the model as a CUDA graph, as long as its weights live."""
    torch._dynamo.reset()
    called = torch.compile(model) if mode == "compiled" else model

    def run():
        with torch.no_grad():
            return called(images)

    return graph_of([run]).replay


@cache  # the same for all settings
def whole_for(mode: str, embedding: str):
    """(model, images, replay) of the unpruned model."""
    model, images = deit(embedding), images_for(embedding)
    return model, images, replay_of(model, mode, images)


def rows_of(setting: str, mode: str, embedding: str, models: dict, replays: dict):
    """The rows of random dropping and Zero-TPrune, each timed in turns with the whole model."""
    turns = [
        {form: quantiles(replay, repeats=7, per_repeat=1) for form, replay in replays.items()}
        for _ in range(TURNS)
    ]
    left = left_by(setting)[1:]
    for form in replays:
        first, median, third = (
            float(torch.tensor([t[form][i] for t in turns]).median()) / 1000 for i in range(3)
        )
        ratios = torch.tensor([t["plain"][1] / t[form][1] for t in turns])
        yield {
            "model": MODEL,
            "setting": setting,
            "form": form,
            "mode": mode,
            "embedding": embedding,
            "batch": BATCH,
            "dtype": "bfloat16",
            "gmacs": round(pcx.multiply_adds(models[form], patch_embedding=False) / 1e9, 3),
            "patches": PATCHES if form == "plain" else " ".join(map(str, left)),
            "ms_median": round(median, 3),
            "ms_q1": round(first, 3),
            "ms_q3": round(third, 3),
            "images_per_s": round(1000 * BATCH / median),
            "against_plain": round(float(ratios.median()), 3),
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "timm": timm.__version__,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    file, before = table(parser.parse_args().out, "zero_tprune")
    done = {(row["setting"], row["mode"], row["embedding"]) for row in before}
    torch.backends.cudnn.benchmark = True
    check_embedding()
    with open(file, "a", newline="") as output:
        writer = csv.DictWriter(output, FIELDS.split())
        if not before:
            writer.writeheader()
        for setting, mode, embedding in CASES:
            if (setting, mode, embedding) in done:
                continue
            check(setting)
            whole, images, plain = whole_for(mode, embedding)
            models, replays = {"plain": whole}, {"plain": plain}
            for form in ("random", "pagerank"):
                models[form] = build(setting, form, embedding)
                replays[form] = replay_of(models[form], mode, images)
            for row in rows_of(setting, mode, embedding, models, replays):
                print(*row.values(), flush=True)
                writer.writerow(row)
            output.flush()


if __name__ == "__main__":
    main()
