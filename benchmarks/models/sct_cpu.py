"""Times SCT on a CPU against its plain backbone: writes a CSV.

`python benchmarks/models/sct_cpu.py` writes `results/sct_cpu.csv`: milliseconds of a call of a
ViT-B/16 in float32, K = 96 channels in every layer. The forms take turns, and a form's ratio is the
median of its ratios to the plain call of the same turn, since machines are not quiet. Before
anything is timed, every form is compared with the plain blocks and SCT's four operations.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import sys
import time
from pathlib import Path

import timm
import torch
from sct import PublishedBlock
from torch import nn

import pcx

sys.path.insert(0, str(Path(__file__).parent.parent))
from machine import cpu_name

FILE = Path(__file__).parent.parent / "results" / "sct_cpu.csv"
K, BATCHES, POSITIONS = 96, (1, 8), ("attn", "mlp", "both")


def backbone() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_base_patch16_224", num_classes=100).eval().requires_grad_(False)


def sct_of(plain: nn.Module, position: str) -> pcx.SCT:
    model = pcx.SCT(plain, None, k=K, position=position, selection="random", head_init="keep")
    with torch.no_grad():
        for parameter in model.salient.parameters():
            parameter.normal_(0, 0.05)
    return model.eval()


def published(plain: nn.Module, model: pcx.SCT) -> nn.Module:
    """The plain model, with four operations behind each position."""
    copied = copy.deepcopy(plain)
    for i, block in enumerate(copied.blocks):
        maps = {name: each[i] for name, each in model.salient.items()}
        copied.blocks[i] = PublishedBlock(block, maps)
    return copied


def forms() -> dict[str, nn.Module]:
    """The forms by name, each compared with the published one."""
    plain = backbone()
    found = {"plain": plain, "plain frozen": pcx.freeze(pcx.Linear(plain, head_init="keep"))}
    images = torch.randn(2, 3, 224, 224)
    for position in POSITIONS:
        model = sct_of(plain, position)
        for name, form in ((position, model), (f"{position} frozen", pcx.freeze(model))):
            with torch.inference_mode():
                expected = published(plain, model)(images)
                torch.testing.assert_close(form(images), expected, rtol=1e-3, atol=1e-3)
                assert (plain(images) - expected).norm() > 1e-2 * expected.norm()
            found[f"SCT {name}"] = form
    return found


def measure(models: dict[str, nn.Module], batch: int, turns: int) -> list[dict[str, object]]:
    images = torch.randn(batch, 3, 224, 224)
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(turns + 1):
            for name, model in models.items():
                start = time.perf_counter()
                model(images)
                if turn:  # the first one warms up
                    times[name].append(1000 * (time.perf_counter() - start))
    rows: list[dict[str, object]] = []
    for name, of_form in times.items():
        ratios = [a / b for a, b in zip(of_form, times["plain"], strict=True)]
        first, middle, third = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "batch": batch,
                "form": name,
                "ms": f"{statistics.median(of_form):.1f}",
                "ratio": f"{middle:.3f}",
                "ratio_quartiles": f"{first:.3f} {third:.3f}",
                "turns": turns,
                "cpu": cpu_name(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
        )
        print(*rows[-1].values(), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=40, help="of one image; a fourth with eight")
    turns = parser.parse_args().turns
    models = forms()
    rows = measure(models, BATCHES[0], turns) + measure(models, BATCHES[1], max(2, turns // 4))
    with FILE.open("w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
