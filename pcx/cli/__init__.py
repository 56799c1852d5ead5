"""The command line: pcx demo | train | condense | eval | prune | search."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from rich.console import Console
from torch import nn

from pcx.analysis.cost import token_cost
from pcx.analysis.kept_patches import draw_kept
from pcx.backbones import NAME, scenes_vit
from pcx.backbones.inputs import data_config
from pcx.checkpoints.saving import load, save
from pcx.condensation.condensing import condense as condense_model
from pcx.experiments import demo as demo_module
from pcx.models.vpt.model import VPT
from pcx.tasks import load_task
from pcx.token_pruning.budget_search import search as search_settings
from pcx.token_pruning.dropping import zero_tprune
from pcx.training.evaluation import evaluate, standard_error
from pcx.training.fitting import fit

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

Backbone = Annotated[str, typer.Option(help=f"a timm model name, or {NAME}, the embedded one")]
TaskName = Annotated[
    str, typer.Option("--task", help="digits, sprites:..., vtab:..., fgvc:..., or timm's name")
]
Root = Annotated[Path | None, typer.Option(help="folder of data sets on disk")]
Weights = Annotated[
    Path | None, typer.Option(help="a file of the backbone's weights, in place of timm's download")
]
Amp = Annotated[str, typer.Option(help="no, bf16 or fp16")]
ModelFile = Annotated[Path, typer.Argument(help="a file that pcx train or condense wrote")]


def new_backbone(name: str, num_classes: int, weights: Path | None = None) -> nn.Module:
    """The embedded backbone or one of timm, with timm's weights or those of a file."""
    if name == NAME:
        if weights is not None:
            raise ValueError(f"--weights: {NAME} has its own; give --backbone as well")
        return scenes_vit(num_classes)
    if not timm.is_model(name):
        raise ValueError(f"--backbone: timm knows no {name!r}; see timm.list_models()")
    if weights is None:
        return timm.create_model(name, pretrained=True, num_classes=num_classes)
    if not weights.is_file():
        raise FileNotFoundError(f"--weights: no file {weights}")
    overlay = {"file": str(weights)}
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes
    )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for results")] = Path("runs/demo"),
    seed: int = 0,
) -> None:
    """VPT and Prompt Condensation on data in the package; minutes on two CPU cores."""
    demo_module.demo(out, seed=seed)


@app.command()
def train(
    task: TaskName,
    out: Annotated[Path, typer.Option(help="file for prompts and head (.safetensors)")],
    backbone: Backbone = NAME,
    weights: Weights = None,
    prompts: Annotated[
        str, typer.Option(help="per layer, or one count per layer as 8,8,4; 0 is a linear probe")
    ] = "20",
    kind: str = "deep",
    dropout: float = 0.0,
    epochs: int = 100,
    lr: Annotated[float | None, typer.Option(help="the learning rate itself")] = None,
    base_lr: Annotated[float | None, typer.Option(help="scaled by batch / 256")] = None,
    weight_decay: float = 1e-3,
    batch_size: int = 64,
    split: Annotated[
        str, typer.Option(help="train, to choose settings by val, or trainval")
    ] = "train",
    head_init: Annotated[str, typer.Option(help="published or keep")] = "published",
    clip_grad: float | None = None,
    root: Root = None,
    amp: Amp = "no",
    seed: int = 0,
    workers: int = 0,
    resume: Annotated[bool, typer.Option(help="continue from the run's checkpoint")] = False,
) -> None:
    """Trains prompts and head on a task."""
    config = data_config(new_backbone(backbone, 0, weights))
    data = load_task(task, config, root=root)
    if split not in ("train", "trainval"):
        raise ValueError(f"--split: got {split!r}, expected train or trainval")
    torch.manual_seed(seed)
    model = VPT(
        new_backbone(backbone, data.num_classes, weights),
        _counts(prompts),
        kind=kind,
        dropout=dropout,
        head_init=head_init,
    )
    fit(
        model,
        data.loader(split, batch_size, num_workers=workers),
        epochs=epochs,
        lr=lr,
        base_lr=base_lr,
        val_loader=data.loader("val", batch_size, num_workers=workers)
        if split == "train"
        else None,
        weight_decay=weight_decay,
        clip_grad=clip_grad,
        amp=amp,
        seed=seed,
        checkpoint_dir=out.with_name(f"{out.name}.ckpt"),
        resume=resume,
    )
    save(model, out)
    Console().print(f"wrote {out}")
    _say_accuracy(model, data, batch_size, amp)


@app.command()
def condense(
    model: ModelFile,
    task: TaskName,
    out: Annotated[Path, typer.Option(help="file for the condensed model")],
    keep: Annotated[str, typer.Option(help="a fraction, a count, or auto")] = "0.3",
    backbone: Backbone = NAME,
    weights: Weights = None,
    method: str = "taylor",
    scope: str = "global",
    epochs: int = 20,
    lr: Annotated[float | None, typer.Option(help="a tenth of the training's by default")] = None,
    batch_size: int = 64,
    split: str = "train",
    clip_grad: float | None = None,
    root: Root = None,
    amp: Amp = "no",
    seed: int = 0,
    workers: int = 0,
) -> None:
    """Scores, selects and fine-tunes (Prompt Condensation, Algorithm 1)."""
    if keep == "auto" and split != "train":
        raise ValueError(
            f"--split: {split!r} holds the images of val, by which --keep auto chooses; use train"
        )
    whole = load(model, new_backbone(backbone, 0, weights))
    data = load_task(task, data_config(whole), root=root)
    cost = token_cost(whole)
    folded, concat = _percent(cost["folded_flops"]), _percent(cost["concat_flops"])
    Console().print(
        f"prompts are {cost['relative_tokens']:.0f}% of the image's tokens; folded they add "
        f"{folded} operations, concatenated {concat}"
    )
    small = condense_model(
        whole,
        data.loader(split, batch_size, num_workers=workers),
        _keep(keep),
        method=method,
        scope=scope,
        epochs=epochs,
        lr=lr,
        val_loader=data.loader("val", batch_size, num_workers=workers),
        clip_grad=clip_grad,
        amp=amp,
        seed=seed,
    )
    save(small, out)
    Console().print(f"kept {small.counts} of {whole.counts}; wrote {out}")
    _say_accuracy(small, data, batch_size, amp)


@app.command("eval")
def eval_(
    model: ModelFile,
    task: TaskName,
    backbone: Backbone = NAME,
    weights: Weights = None,
    split: str = "test",
    batch_size: int = 64,
    root: Root = None,
    amp: Amp = "no",
    workers: int = 0,
) -> None:
    """Accuracy of a saved model on a split."""
    loaded = load(model, new_backbone(backbone, 0, weights))
    data = load_task(task, data_config(loaded), root=root)
    _say_accuracy(loaded, data, batch_size, amp, split, workers)


@app.command()
def prune(
    model: ModelFile,
    task: TaskName,
    layers: Annotated[str, typer.Option(help="after which to drop patches, from 1, as 2,4")],
    keep: Annotated[str, typer.Option(help="share of the patches that stays, one or one each")],
    iters: Annotated[str, typer.Option(help="of PageRank, one or one each")] = "5",
    similar: Annotated[
        str, typer.Option(help="similar patches to drop first, one or one each")
    ] = "0",
    ranking: Annotated[str, typer.Option(help="pagerank, cls, average or random")] = "pagerank",
    out: Annotated[Path | None, typer.Option(help="a PNG of what is left of some images")] = None,
    images: Annotated[int, typer.Option(help="drawn in it")] = 4,
    backbone: Backbone = NAME,
    weights: Weights = None,
    split: str = "test",
    batch_size: int = 64,
    root: Root = None,
    amp: Amp = "no",
    workers: int = 0,
) -> None:
    """Accuracy of a saved model whole and with image tokens pruned (Zero-TPrune), untrained."""
    if images < 1:
        raise ValueError(f"--images: {images}, expected 1 or more")
    loaded = load(model, new_backbone(backbone, 0, weights)).eval()
    data = load_task(task, data_config(loaded), root=root)

    settings = {
        "layers": _numbers("layers", layers, int),
        "keep": _one_or_more("keep", keep, float),
        "iters": _one_or_more("iters", iters, int),
        "similar": _one_or_more("similar", similar, int),
        "ranking": ranking,
        "cls_boost": loaded.spec.has_cls,
    }
    pruning = zero_tprune(loaded, **settings)
    if out is not None:  # first, since a picture that cannot be written need not wait
        shown = next(iter(data.loader(split, images)))[0]
        with torch.no_grad():
            loaded(shown.to(next(loaded.parameters()).device))
        config = data_config(loaded)
        mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
        draw_kept(shown.cpu() * std + mean, pruning, out)
        Console().print(f"wrote {out}")
    pruning.remove()
    _say_accuracy(loaded, data, batch_size, amp, split, workers)
    zero_tprune(loaded, **settings)
    Console().print("pruned:")
    _say_accuracy(loaded, data, batch_size, amp, split, workers)


@app.command()
def search(
    model: ModelFile,
    task: TaskName,
    budget: Annotated[float, typer.Option(help="share of the multiply-adds, or a number of them")],
    trials: Annotated[int, typer.Option(help="settings to evaluate on images of val")] = 100,
    images: Annotated[int, typer.Option(help="of val, the same for all settings")] = 1024,
    ranking: Annotated[str, typer.Option(help="pagerank, cls, average or random")] = "pagerank",
    storage: Annotated[
        str | None, typer.Option(help="Optuna's, as sqlite:///search.db; goes on where it stopped")
    ] = None,
    backbone: Backbone = NAME,
    weights: Weights = None,
    split: Annotated[str, typer.Option(help="on which the best one is evaluated")] = "test",
    batch_size: int = 64,
    root: Root = None,
    amp: Amp = "no",
    seed: int = 0,
    workers: int = 0,
) -> None:
    """Searches settings of pcx prune at a budget, and evaluates the best (Zero-TPrune, 4.1)."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # the bar says how it goes
    loaded = load(model, new_backbone(backbone, 0, weights)).eval()
    data = load_task(task, data_config(loaded), root=root)
    found = search_settings(
        loaded,
        data.loader("val", batch_size, num_workers=workers),
        budget=budget,
        trials=trials,
        images=images,
        seed=seed,
        fixed={"ranking": ranking, "cls_boost": loaded.spec.has_cls},
        storage=storage,
        amp=amp,
    )
    options = {name: found.best[name] for name in ("layers", "keep", "iters", "similar")}
    said = " ".join(f"--{name} {','.join(map(str, values))}" for name, values in options.items())
    Console(soft_wrap=True).print(f"pcx prune {said} --ranking {ranking}", highlight=False)
    _say_accuracy(loaded, data, batch_size, amp, split, workers)
    zero_tprune(loaded, **found.best)
    Console().print("pruned:")
    _say_accuracy(loaded, data, batch_size, amp, split, workers)


def _numbers(name: str, text: str, kind: Any) -> list:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--{name}: {text!r}, expected numbers as 1,2,3") from None


def _one_or_more(name: str, text: str, kind: Any) -> Any:
    numbers = _numbers(name, text, kind)
    return numbers[0] if len(numbers) == 1 else numbers


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}%"


def _counts(text: str) -> int | list[int]:
    return _one_or_more("prompts", text, int)


def _keep(text: str) -> float | int | str:
    if text == "auto":
        return text
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise ValueError(f"--keep: {text!r}, expected a fraction, a count or auto") from None


def _say_accuracy(model, data, batch_size, amp, split="test", workers=0) -> None:
    found = evaluate(model, data.loader(split, batch_size, num_workers=workers), amp=amp)
    Console().print(
        f"{data.name} {split}: {found['accuracy']:.2f} ± {standard_error(found):.2f}% "
        f"on {found['samples']} images, loss {found['loss']:.4f}"
    )


def main() -> None:
    """Runs the command line; a wrong argument or file ends in one line, not in a traceback."""
    try:
        app()
    except (ValueError, OSError, FloatingPointError) as error:
        Console(stderr=True).print(f"pcx: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)
