"""Trains a model as one of several processes.

`python train_together.py FOLDER BATCH DEVICE METHOD [divided]`; "divided" gives each process its
samples.
"""

import os
import sys
from pathlib import Path

import timm
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import pcx

MODELS = {
    "vpt": lambda backbone: pcx.VPT(backbone, 3),
    "sct": lambda backbone: pcx.SCT(backbone, None, k=5, selection="random"),
    "adapter": lambda backbone: pcx.Adapter(backbone, 4),
}


def main() -> None:
    folder, batch, device = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    rank = int(os.environ.get("RANK", 0))
    dtype = torch.float64 if device == "cpu" else torch.float32
    torch.manual_seed(0)
    backbone = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2, num_classes=3
    )
    images, labels = torch.randn(48, 3, 32, 32, dtype=dtype), torch.arange(48) % 3
    torch.manual_seed(rank)  # only the first process has the prompts that all are to have
    model = MODELS[sys.argv[4]](backbone.to(dtype))
    data, sampler = TensorDataset(images, labels), None
    if "divided" in sys.argv and "WORLD_SIZE" in os.environ:
        parts = int(os.environ["WORLD_SIZE"])
        sampler = DistributedSampler(data, num_replicas=parts, rank=rank, shuffle=False)
    loader = DataLoader(data, batch_size=batch, sampler=sampler)
    history = pcx.fit(
        model, loader, epochs=3, lr=0.05, val_loader=loader, clip_grad=1.0, progress=False
    )
    state = {name: tensor.detach().cpu() for name, tensor in model.own_state().items()}
    torch.save({"state": state, "history": history}, folder / f"rank{rank}.pt")


main()
