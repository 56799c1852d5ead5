"""VPT, Prompt Condensation and token pruning together, frozen, against the plain backbone.

`python benchmarks/models/together.py --work accuracy` writes `results/together_accuracy.csv`: the
test accuracy and the multiply-adds of the embedded backbone after each step, on two tasks and three
seeds. Rates are fixed, and no setting is searched for. On a GPU, `--work speed` writes
`results/together_<gpu>.csv`: the time of a batch of a ViT-B/16 with 100 prompts a layer, after each
step, frozen (bfloat16), the ways taking turns. Its prompts are not trained, as their values do not
change the time. The frozen VPT is compared with the unfrozen one before; condensed and pruned
models compute something else.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from by_hand import PROMPTS, RESULTS, VITS, backbone_of, in_turns, inference_of
from gpu_timing import table

import pcx
from pcx.backbones import scenes_vit
from pcx.backbones.inputs import data_config
from pcx.tasks import load_task
from pcx.token_pruning.dropping import VARIANTS

TASKS, SEEDS = ("digits", "sprites:ori"), (0, 1, 2)
EPOCHS, MORE, RATE, MORE_RATE = 15, 6, 0.3, 0.1
OPTIMISER: dict[str, Any] = {"opt": "sgd", "clip_grad": 1.0, "progress": False}
PRUNING: dict[str, Any] = {"layers": (2, 4), "keep": 0.7, "iters": (5, 5), "similar": 2}


def steps(task: Any, seed: int) -> Iterator[tuple[str, pcx.TunedModel]]:
    """Each step's name, and its model in eval mode."""
    train = task.loader("trainval", 32)
    first = {"epochs": EPOCHS, "lr": RATE, "seed": seed, **OPTIMISER}
    more = {"epochs": MORE, "lr": MORE_RATE, "seed": seed, **OPTIMISER}
    head: dict[str, Any] = {"num_classes": task.num_classes, "head_init": "keep"}
    torch.manual_seed(seed)
    probe = pcx.Linear(scenes_vit(), **head)
    pcx.fit(probe, train, **first)
    yield "linear probe", probe.eval()
    torch.manual_seed(seed)
    model = pcx.VPT(scenes_vit(), 20, **head)
    pcx.fit(model, train, **first)
    yield "VPT", model.eval()
    small = pcx.condense(model, train, 0.3, **more)
    yield "30% of the prompts", small.eval()
    pruned = small.copy()
    pcx.zero_tprune(pruned, **PRUNING)
    yield "30% of the prompts, pruned", pruned.eval()
    pcx.fit(pruned, train, warmup_epochs=0, **more)
    yield "30% of the prompts, pruned, fine-tuned", pruned.eval()


def accuracy() -> None:
    rows = []
    for name in TASKS:
        task = load_task(name, data_config(scenes_vit()))
        test, whole = task.loader("test", 256), pcx.multiply_adds(scenes_vit())
        for seed in SEEDS:
            for step, model in steps(task, seed):
                frozen = pcx.freeze(model)
                found, cost = pcx.evaluate(model, test), pcx.multiply_adds(model) / whole
                images = next(iter(test))[0][:8]
                with torch.no_grad():
                    torch.testing.assert_close(frozen(images), model(images), rtol=1e-3, atol=1e-3)
                values = name, seed, step, f"{found['accuracy']:.2f}", f"{cost:.3f}"
                rows.append([*values, found["samples"], torch.__version__])
                print(*values, flush=True)
    fields = ["task", "seed", "step", "accuracy", "multiply_adds", "images", "torch"]
    written(RESULTS / "together_accuracy.csv", fields, rows)


def speed() -> None:
    name = VITS["ViT-B/16"]
    plain = backbone_of(name)
    torch.manual_seed(1)
    model = pcx.VPT(plain, PROMPTS, num_classes=100).cuda().eval()
    small = model.keep(pcx.select(pcx.score(model, [], method="random"), 0.3)).eval()
    pruned = small.copy().eval()
    pcx.zero_tprune(pruned, **VARIANTS["a"])
    made: dict[str, torch.nn.Module] = {"timm's plain model, eager": plain}
    for way, each in (
        ("plain", plain),
        ("VPT", model),
        ("30% of the prompts", small),
        ("30% of the prompts, pruned", pruned),
    ):
        made[f"{way}, frozen"] = pcx.freeze(each, amp="bf16")
    file, _ = table(RESULTS, "together")
    rows = []
    for batch in (1, 64, 256):
        x = torch.randn(batch, 3, 224, 224, device="cuda")
        ways = {way: inference_of(each, x) for way, each in made.items()}
        expected = inference_of(model, x)().float()
        found = [ways["VPT, frozen"]().float() for _ in range(3)][-1]
        assert (found - expected).norm() < 2e-2 * expected.norm()
        for way, ms in in_turns(ways, 10).items():
            rows.append([way, batch, f"{ms:.3f}", torch.cuda.get_device_name(), torch.__version__])
            print(*rows[-1], flush=True)
    written(file, ["way", "batch", "ms", "gpu", "torch"], rows)


def written(file: Path, fields: list[str], rows: list[list]) -> None:
    with file.open("w", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(fields)
        writer.writerows(rows)


WORKS = {"accuracy": accuracy, "speed": speed}


if __name__ == "__main__":
    options = argparse.ArgumentParser()
    options.add_argument("--work", nargs="*", choices=WORKS, default=list(WORKS))
    for work in options.parse_args().work:
        WORKS[work]()
