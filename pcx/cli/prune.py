"""The command `pcx prune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pcx.cli import options as o

if TYPE_CHECKING:
    from pcx.models.vpt.model import VPT
    from pcx.token_pruning.dropping import Pruning


def prune(
    model: o.ModelFile,
    layers: Annotated[
        str, typer.Option(help="layers after which to drop patches, from 1, such as 2,4")
    ],
    keep: Annotated[
        str, typer.Option(help="share of the patches that stay, for all layers or one each")
    ],
    photos: o.Photos = None,
    task: o.TaskName = None,
    iters: Annotated[
        str, typer.Option(help="PageRank iterations, for all layers or one each")
    ] = "5",
    similar: Annotated[
        str, typer.Option(help="similar patches to drop first, for all layers or one each")
    ] = "0",
    ranking: o.Ranking = "pagerank",
    out: Annotated[
        Path | None, typer.Option(help="file for a picture of the patches left (.png)")
    ] = None,
    images: Annotated[int, typer.Option(help="number of images in that picture")] = 4,
    backbone: o.FileBackbone = None,
    weights: o.Weights = None,
    split: o.HeldOut = None,
    batch_size: o.BatchSize = 64,
    root: o.Root = None,
    amp: o.Amp = "no",
    workers: o.Workers = 0,
    cache: o.Cache = None,
    config: o.Config = None,
) -> None:
    """Accuracy of a saved model, whole and with tokens pruned by Zero-TPrune without training."""
    from pcx.token_pruning.dropping import zero_tprune

    if out is not None:
        o.check_out(out, replaced=True)
    if images < 1:
        raise ValueError(f"--images: {images}, expected 1 or more")
    name = o.one_task(photos, task)
    loaded = o.loaded_model(model, backbone, weights).eval()
    data = o.task_for(loaded, name, root, cache)
    settings: dict[str, Any] = {
        "layers": o.numbers("layers", layers, int),
        "keep": o.one_or_more("keep", keep, float),
        "iters": o.one_or_more("iters", iters, int),
        "similar": o.one_or_more("similar", similar, int),
        "ranking": ranking,
        "cls_boost": loaded.spec.has_cls,
    }
    pruning = zero_tprune(loaded, **settings)
    if out is not None:  # first, so that a picture that cannot be written is an error at once
        _draw(loaded, pruning, next(iter(data.loader(split or data.held_out, images)))[0], out)
    pruning.remove()
    o.say_accuracy(loaded, data, batch_size, amp, split, workers)
    zero_tprune(loaded, **settings)
    o.say("pruned:")
    o.say_accuracy(loaded, data, batch_size, amp, split, workers)


def _draw(model: VPT, pruning: Pruning, images: Any, out: Path) -> None:
    """Draws the patches that a pruned model leaves of images [B, C, H, W]."""
    import torch

    from pcx.analysis.kept_patches import draw_kept
    from pcx.backbones.inputs import data_config

    with torch.no_grad():
        model(images.to(next(model.parameters()).device))
    config = data_config(model)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    draw_kept(images.cpu() * std + mean, pruning, out)
    o.say(f"wrote {out}")
