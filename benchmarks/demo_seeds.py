"""Runs `pcx demo` over several seeds; `python benchmarks/demo_seeds.py` writes a CSV.

The CSV is results/demo_cpu.csv.
"""

from __future__ import annotations

import csv
import tempfile
from pathlib import Path

import timm
import torch

from pcx.experiments.demo import METHODS, demo

SEEDS = (0, 1, 2)
FILE = Path(__file__).parent / "results" / "demo_cpu.csv"


def rows(seed: int) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        result = demo(Path(folder), seed=seed)
    return [
        {
            "task": task,
            "seed": seed,
            "method": method,
            "accuracy": round(found["accuracy"][method], 2),
            "standard_error": round(found["standard_error"][method], 2),
            "test_images": found["test_images"],
            "parameters": found["parameters"][method],
            "learning_rate": found["learning_rate"].get(method, ""),
            "threads": result["threads"],
            "torch": torch.__version__,
            "timm": timm.__version__,
        }
        for task, found in result["tasks"].items()
        for method in METHODS
    ]


if __name__ == "__main__":
    table = [row for seed in SEEDS for row in rows(seed)]
    with open(FILE, "w", newline="") as output:
        writer = csv.DictWriter(output, table[0])
        writer.writeheader()
        writer.writerows(table)
    for task in sorted({row["task"] for row in table}):
        for method, label in METHODS.items():
            found = [r["accuracy"] for r in table if (r["task"], r["method"]) == (task, method)]
            print(f"{task:12} {label:34} {sum(found) / len(found):.1f} of {found}")
