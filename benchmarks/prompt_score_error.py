"""Measures the error of scores against those of one sample at a time in float64, on a GPU.

`python benchmarks/prompt_score_error.py` writes `results/prompt_score_error_<gpu>.csv`. A row is a
layer under `pcx.score(method="taylor")`, in float32 or in bfloat16 autocast. It has the largest
relative error of a prompt's score, and Spearman's rank correlation.

The models are the embedded backbone with prompts trained on the digits, and ViT-B/16 with random
weights, prompts and images. The scores of the latter lie closer together than rounding in 16 bits
can tell apart.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

import pcx
from pcx.backbones import scenes_vit
from pcx.backbones.inputs import data_config
from pcx.tasks import load_task

sys.path.insert(0, str(Path(__file__).parent))
from gpu_timing import table
from machine import cpu_name

RESULTS = Path(__file__).parent / "results"
BATCH, CLASSES = 64, 100
FIELDS = "model prompts images dtype layer relative_error spearman spread machine torch timm"


def trained(device: str) -> tuple[pcx.VPT, torch.Tensor, torch.Tensor]:
    """A VPT over the embedded backbone, trained on the digits, and images of digits."""
    task = load_task("digits", data_config(scenes_vit()))
    loader = task.loader("trainval", 32)
    torch.manual_seed(0)
    model = pcx.VPT(scenes_vit(), 50, num_classes=task.num_classes, head_init="keep").to(device)
    pcx.fit(model, loader, epochs=15, lr=0.1, opt="sgd", clip_grad=1.0, progress=False)
    images, labels = (torch.cat(parts)[:256] for parts in zip(*loader, strict=True))
    return model.eval(), images.to(device), labels.to(device)


def untrained(device: str) -> tuple[pcx.VPT, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    backbone = timm.create_model("vit_base_patch16_224", num_classes=CLASSES)
    model = pcx.VPT(backbone, 100, head_init="keep").to(device).eval()
    images = torch.randn(64, 3, 224, 224, device=device)
    return model, images, torch.arange(64, device=device) % CLASSES


MODELS = {"scenes_vit, trained": trained, "vit_base_patch16_224, random": untrained}


def one_by_one(model: pcx.VPT, images: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    prompts = list(model.prompts)
    totals = [torch.zeros(len(p), dtype=p.dtype, device=p.device) for p in prompts]
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        grads = torch.autograd.grad(F.cross_entropy(model(image), label), prompts)
        for total, g, p in zip(totals, grads, prompts, strict=True):
            total += (g * p.detach()).norm(dim=-1)
    return [total / len(images) for total in totals]


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's rank correlation of two lists without equal entries."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def measure(name: str, device: str):
    torch.backends.cudnn.allow_tf32 = False  # the patch embedding must be float32, not TF32
    model, images, labels = MODELS[name](device)
    model.double()
    expected = [s.cpu() for s in one_by_one(model, images.double(), labels)]
    model.float()
    batches = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    for dtype, amp in (("float32", "no"), ("bfloat16 autocast", "bf16")):
        found = pcx.score(model, batches, amp=amp, progress=False)
        for layer, (a, b) in enumerate(zip(found, expected, strict=True)):
            a = a.double().cpu()
            yield {
                "model": name,
                "prompts": len(b),
                "images": len(images),
                "dtype": dtype,
                "layer": layer,
                "relative_error": f"{float(((a - b).abs() / b).max()):.2e}",
                "spearman": round(spearman(a, b), 6),
                "spread": round(float(b.std() / b.mean()), 4),  # of the scores, relative
                "machine": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
                "torch": torch.__version__,
                "timm": timm.__version__,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    file, _ = table(parser.parse_args().out, "prompt_score_error")
    with open(file, "w", newline="") as output:
        writer = csv.DictWriter(output, FIELDS.split())
        writer.writeheader()
        for name in MODELS:
            for row in measure(name, "cuda"):
                print(*row.values(), flush=True)
                writer.writerow(row)


if __name__ == "__main__":
    main()
