"""Scoring a batch, beside what its gradients cost otherwise.

`pytest benchmarks/bench_prompt_score.py` checks and times. Run as a program it
writes `results/prompt_score_cpu.csv`, or `prompt_score_<gpu>.csv` where there is a GPU.

- plain: the backbone's forward and the gradient of the loss down to the input of its first block;
- pcx: `pcx.score(method="taylor")`;
- expanded: every sample has its own prompts, which pass each block's norm and projection;
- one by one: a batch of one sample at a time.
"""

from __future__ import annotations

import csv
import statistics
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

import pcx

sys.path.insert(0, str(Path(__file__).parent))
from gpu_timing import table
from machine import cpu_name

RESULTS = Path(__file__).parent / "results"
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
MODEL, BATCH = ("vit_base_patch16_224", 64) if ON_GPU else ("vit_tiny_patch16_224", 16)
COUNTS = (10, 50, 100, 200)


class Setting:
    """A model, a batch, and the four forms of what scoring it takes."""

    def __init__(self, prompts: int):
        torch.manual_seed(0)
        self.backbone = timm.create_model(MODEL, num_classes=100).to(DEVICE).eval()
        self.backbone.requires_grad_(False)
        self.model = pcx.VPT(self.backbone, prompts, read_only=False).eval()
        self.images = torch.randn(BATCH, 3, 224, 224, device=DEVICE)
        self.labels = torch.arange(BATCH, device=DEVICE) % 100

    def plain(self) -> torch.Tensor:
        first, seen = self.backbone.blocks[0], []

        def watch(_, arguments):
            seen.append(arguments[0].detach().requires_grad_())
            return seen[0]

        hook = first.register_forward_pre_hook(watch)
        try:
            loss = F.cross_entropy(self.backbone(self.images), self.labels, reduction="sum")
            return torch.autograd.grad(loss, seen)[0]
        finally:
            hook.remove()

    def _loader(self, batch: int) -> DataLoader:
        return DataLoader(TensorDataset(self.images, self.labels), batch_size=batch)

    def pcx(self) -> list[torch.Tensor]:
        return pcx.score(self.model, self._loader(BATCH), progress=False)

    def one_by_one(self) -> list[torch.Tensor]:
        return pcx.score(self.model, self._loader(1), progress=False)

    def expanded(self) -> list[torch.Tensor]:
        prompts = [p.detach() for p in self.model.prompts]
        leaves = [p.expand(BATCH, *p.shape).requires_grad_() for p in prompts]
        names = {f"prompts.{i}": leaf for i, leaf in enumerate(leaves)}
        logits = functional_call(self.model, names, (self.images,))
        loss = F.cross_entropy(logits, self.labels, reduction="sum")
        grads = torch.autograd.grad(loss, leaves)
        return [
            (g * p).norm(dim=-1).mean(0).double().cpu() for g, p in zip(grads, prompts, strict=True)
        ]


FORMS = {"plain": "plain", "pcx": "pcx", "expanded": "expanded", "one by one": "one_by_one"}


def check(setting: Setting) -> None:
    """The three ways to the scores agree."""
    expected = setting.expanded()
    for found in (setting.pcx(), setting.one_by_one()):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7)


@pytest.fixture(scope="module")
def setting():
    made = Setting(100)
    check(made)
    return made


@pytest.mark.parametrize("form", FORMS)
def test_scoring_a_batch(benchmark, setting, form):
    def run():
        getattr(setting, FORMS[form])()
        if ON_GPU:
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)


def measure(prompts: int, repeats: int = 7) -> list[dict]:
    """One row per form; the forms take turns, so that a slower minute meets all of them."""
    setting = Setting(prompts)
    check(setting)
    setting.plain()
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    for _ in range(repeats):
        for form, method in FORMS.items():
            start = time.perf_counter()
            getattr(setting, method)()
            if ON_GPU:
                torch.cuda.synchronize()
            times[form].append(time.perf_counter() - start)
    rows = []
    for form, seconds in times.items():
        first, median, third = statistics.quantiles(seconds, n=4)
        rows.append(
            {
                "model": MODEL,
                "form": form,
                "prompts": prompts,
                "batch": BATCH,
                "dtype": "float32",
                "seconds_median": round(median, 4),
                "seconds_q1": round(first, 4),
                "seconds_q3": round(third, 4),
                "threads": torch.get_num_threads(),
                "machine": torch.cuda.get_device_name() if ON_GPU else cpu_name(),
                "torch": torch.__version__,
                "timm": timm.__version__,
            }
        )
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    file = table(RESULTS, "prompt_score")[0] if ON_GPU else RESULTS / "prompt_score_cpu.csv"
    rows = [row for prompts in COUNTS for row in measure(prompts)]
    with open(file, "w", newline="") as output:
        writer = csv.DictWriter(output, rows[0])
        writer.writeheader()
        writer.writerows(rows)
