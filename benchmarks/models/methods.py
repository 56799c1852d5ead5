"""Ten methods over the embedded backbone, each at its best by val.

`python benchmarks/models/methods.py --processes 14` compares them on four tasks with three seeds,
by `pcx.experiments.protocol` and the default grids: 776 trainings that choose, and 120 that are
tested. It writes `results/methods_<device>.csv`, `.md` and `.png`. What is finished lies in
`runs/methods`, and a further call goes on from there. `--quick` trains two methods on one task for
an epoch, and writes to `--runs` alone.
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path
from typing import Any

from pcx.backbones import scenes_vit
from pcx.backbones.inputs import data_config
from pcx.experiments.compare import Comparison, compare
from pcx.experiments.grids import Changes
from pcx.experiments.reports import CSV, FIGURE, MARKDOWN, write_reports
from pcx.experiments.trials import Recipe
from pcx.tasks import load_task

RESULTS = Path(__file__).parents[1] / "results"
TASKS = ("digits", "sprites:ori", "sprites:loc", "sprites:count")
METHODS = (
    "linear",
    "mlp",
    "bias",
    "partial:num_layers=1",
    "adapter:reduction=8",
    "sidetune:pretrained=false",
    "sct:k=24",  # a quarter of the width; the paper's 96 of 768 is an eighth
    "vpt:num_prompts=10",
    "vpt:num_prompts=20,kind=shallow",
    "full",
)
QUICK: dict[str, Any] = {"seeds": 1, "changes": Changes([0.1], [1e-4], [None])}


def check(found: Comparison) -> None:
    """Raises an AssertionError where a row cannot be right."""
    assert len(found.rows) == len(found.tasks) * len(found.methods)
    for row in found.rows:
        assert all(0 < value <= 100 for value in row.accuracies), row
        assert row.diverged < row.cells, row


def device_in(found: Comparison) -> str:
    """The GPU as names of results have it, such as h100_80gb_hbm3; "cpu" without one."""
    if all(row.peak_mib is None for row in found.rows):
        return "cpu"
    return re.sub(r"\W+", "_", found.settings["device"].lower()).removeprefix("nvidia_")


def report(found: Comparison, runs: Path, stem: str | None) -> None:
    """Writes the reports to a folder and, unless the stem is None, to `results/<stem>_<device>`."""
    check(found)
    write_reports(found, runs)
    for name in (CSV, MARKDOWN, FIGURE) if stem else ():
        shutil.copyfile(runs / name, RESULTS / f"{stem}_{device_in(found)}{Path(name).suffix}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    names, texts = (TASKS[:1], METHODS[:2]) if options.quick else (TASKS, METHODS)
    settings = data_config(scenes_vit())
    found = compare(
        {name: load_task(name, settings) for name in names},
        texts,
        scenes_vit,
        options.runs,
        recipe=Recipe(epochs=1 if options.quick else options.epochs),
        processes=options.processes,
        **(QUICK if options.quick else {}),
    )
    report(found, options.runs, None if options.quick else "methods")


if __name__ == "__main__":
    main()
