"""Times one mixed batch of several tasks against each task's model alone: writes a CSV.

`python benchmarks/models/multi_task.py` writes `results/multi_task_<gpu>.csv`: the milliseconds of
64 images of eight tasks on a ViT-B/16 with 100 prompts a layer, eight images a task, frozen
(bfloat16), the ways taking turns.

- one mixed batch: `pcx.multi_task`, all images in one call;
- one task after another: eight calls of models that `pcx.freeze` made, each of eight images.

Both are timed recorded in CUDA graphs ("recorded") and as eager calls ("eager"). Before, the logits
of the mixed batch are compared with those of the models alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from by_hand import PROMPTS, RESULTS, VITS, Rows, backbone_of, in_turns, peak_of

import pcx

TASKS, EACH = 8, 8
CLASSES = (10, 47, 100, 102, 120, 196, 200, 397)  # of well-known data sets
MIXED, ALONE = "one mixed batch", "one task after another"


def models_of(name: str) -> list[pcx.VPT]:
    """A VPT for each task; prompts are drawn, as their values do not change the time."""
    plain, found = backbone_of(name), []
    for classes in CLASSES:
        torch.manual_seed(classes)
        found.append(pcx.VPT(plain, PROMPTS, num_classes=classes).cuda().eval())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    rows = Rows(parser.parse_args().out, "multi_task")
    models = models_of(VITS["ViT-B/16"])
    x = torch.randn(TASKS * EACH, 3, 224, 224, device="cuda")
    index = torch.arange(TASKS, device="cuda").repeat(EACH)  # a task's images do not lie together
    parts = [x[index == task].contiguous() for task in range(TASKS)]
    for work, execution in (("recorded", "cuda-graph"), ("eager", "eager")):
        served = pcx.multi_task(models, amp="bf16", execution=execution)
        frozen = [pcx.freeze(model, amp="bf16", execution=execution) for model in models]

        def together(served=served):
            return served(x, index)

        def alone(frozen=frozen):
            return [model(part) for model, part in zip(frozen, parts, strict=True)]

        for task, logits in enumerate(alone()):
            found = together()[index == task][:, : CLASSES[task]].float()
            assert (found - logits.float()).norm() < 2e-2 * logits.float().norm(), task
        times = in_turns({MIXED: together, ALONE: alone}, 20)
        for way, call in ((MIXED, together), (ALONE, alone)):
            rows.add(work, "ViT-B/16", way, TASKS * EACH, times[way], peak_of(call))
        print(f"{work}: {times[ALONE] / times[MIXED]:.2f}x the images a second", flush=True)


if __name__ == "__main__":
    main()
