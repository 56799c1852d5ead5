"""Trains the embedded backbone: `python -m pcx.experiments.pretrain --out FOLDER`.

It takes minutes on one GPU, and writes `scenes_vit.safetensors` and its log `scenes_vit.csv`. No
scene is seen twice. Accuracy is measured on scenes from another seed.
"""

from __future__ import annotations

import csv
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import typer
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor, nn

from pcx.backbones import WEIGHTS, scenes_vit
from pcx.tasks.scenes import scenes

TRAIN_SEED, HELD_OUT_SEED = 1, 2


def normalise(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1.0


@torch.no_grad()
def accuracy(model: nn.Module, device: str, batches: int = 40, batch: int = 512) -> float:
    """Accuracy on held-out scenes in percent; shape and colour must both be right."""
    generator = torch.Generator(device).manual_seed(HELD_OUT_SEED)
    model.eval()
    right = 0
    for _ in range(batches):
        images, labels = scenes(batch, generator)
        right += int((model(normalise(images)).argmax(1) == labels).sum())
    model.train()
    return 100 * right / (batches * batch)


def main(
    out: Path = Path("pcx/backbones"),
    steps: int = 5000,
    batch: int = 512,
    lr: float = 2e-3,
    log_every: int = 500,
) -> None:
    """Trains and evaluates the backbone, and writes its weights and the log."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = scenes_vit(64, pretrained=False).to(device).train()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=lr, weight_decay=0.05)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=steps, warmup_t=steps // 20, t_in_epochs=False, warmup_prefix=False
    )
    generator = torch.Generator(device).manual_seed(TRAIN_SEED)
    rows, start = [], time.perf_counter()
    for step in range(1, steps + 1):
        images, labels = scenes(batch, generator)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = F.cross_entropy(model(normalise(images)), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step_update(step)
        if step % log_every == 0 or step == steps:
            row = {
                "step": step,
                "images": step * batch,
                "loss": round(loss.item(), 4),
                "held_out_accuracy": round(accuracy(model, device), 2),
                "seconds": round(time.perf_counter() - start, 1),
            }
            rows.append(row)
            print(row, flush=True)
    out.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous().cpu() for k, v in model.state_dict().items()}, out / WEIGHTS)
    with open(out / "scenes_vit.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    typer.run(main)
