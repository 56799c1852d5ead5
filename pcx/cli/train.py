"""pcx train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pcx.cli import options as o


def train(
    task: o.TaskName,
    out: Annotated[Path, typer.Option(help="file for prompts and head (.safetensors)")],
    backbone: o.Backbone = o.EMBEDDED,
    weights: o.Weights = None,
    prompts: Annotated[
        str, typer.Option(help="per layer, or one count per layer as 8,8,4; 0 is a linear probe")
    ] = "20",
    kind: Annotated[str, typer.Option(help="deep, shallow or prefix")] = "deep",
    dropout: Annotated[float, typer.Option(help="of prompt elements, in training")] = 0.0,
    epochs: o.Epochs = 100,
    lr: Annotated[float | None, o.option("the learning rate itself", o.OPTIMISATION)] = None,
    base_lr: Annotated[float | None, o.option("scaled by batch / 256", o.OPTIMISATION)] = None,
    weight_decay: Annotated[float, o.option("on prompts and head weight", o.OPTIMISATION)] = 1e-3,
    batch_size: o.BatchSize = 64,
    split: Annotated[
        str, o.option("train, to choose settings by val, or trainval", o.DATA)
    ] = "train",
    head_init: Annotated[str, typer.Option(help="published or keep")] = "published",
    clip_grad: o.ClipGrad = None,
    root: o.Root = None,
    amp: o.Amp = "no",
    seed: o.Seed = 0,
    workers: o.Workers = 0,
    resume: o.Resume = False,
    config: o.Config = None,
) -> None:
    """Trains prompts and head on a task."""
    import torch

    from pcx.checkpoints.saving import save
    from pcx.models.vpt.model import VPT
    from pcx.tasks import load_task
    from pcx.training.fitting import fit

    data = load_task(task, o.backbone_data_config(backbone, weights), root=root)
    if split not in ("train", "trainval"):
        raise ValueError(f"--split: got {split!r}, expected train or trainval")
    torch.manual_seed(seed)
    model = VPT(
        o.new_backbone(backbone, data.num_classes, weights),
        o.one_or_more("prompts", prompts, int),
        kind=kind,
        dropout=dropout,
        head_init=head_init,
    )
    val = data.loader("val", batch_size, num_workers=workers) if split == "train" else None
    fit(
        model,
        data.loader(split, batch_size, num_workers=workers),
        epochs=epochs,
        lr=lr,
        base_lr=base_lr,
        val_loader=val,
        weight_decay=weight_decay,
        clip_grad=clip_grad,
        amp=amp,
        seed=seed,
        checkpoint_dir=o.run_folder_of(out),
        resume=resume,
    )
    save(model, out)
    o.say(f"wrote {out}")
    o.say_accuracy(model, data, batch_size, amp)
