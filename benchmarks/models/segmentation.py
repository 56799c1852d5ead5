"""A class for every pixel: methods over the embedded backbone with SETR's decoder.

`python benchmarks/models/segmentation.py --processes 14` compares five methods on the task masks
with three seeds, by `pcx.experiments.protocol`, all on the same grid of AdamW: 50 trainings that
choose by the mIoU on val, and 15 that are tested. It writes `results/segmentation_<device>.csv`,
`.md` and `.png`. "linear" trains the decoder alone. `--quick` trains two methods for an epoch, and
writes to `--runs` alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from methods import QUICK, report

from pcx.backbones import scenes_vit
from pcx.backbones.inputs import data_config
from pcx.experiments.compare import compare
from pcx.experiments.grids import Changes
from pcx.experiments.trials import Recipe
from pcx.tasks import load_task

METHODS = (
    "linear",
    "vpt:num_prompts=10",
    "vpt:num_prompts=50",
    "adapter:reduction=8",
    "full",
)
GRID = Changes([3e-4, 1e-3, 3e-3, 1e-2, 3e-2], [1e-4, 1e-2], [None], "adamw")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--runs", type=Path, default=Path("runs/segmentation"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    found = compare(
        {"masks": load_task("masks", data_config(scenes_vit()))},
        METHODS[:2] if options.quick else METHODS,
        scenes_vit,
        options.runs,
        recipe=Recipe(epochs=1 if options.quick else options.epochs),
        processes=options.processes,
        **(QUICK if options.quick else {"changes": GRID}),
    )
    report(found, options.runs, None if options.quick else "segmentation")
    linear, vpt = (row.mean for row in found.rows[:2])
    assert options.quick or vpt > linear, (vpt, linear)


if __name__ == "__main__":
    main()
