"""The command `pcx train`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pcx.cli import options as o
from pcx.models import HEAD_INITS, METHODS

if TYPE_CHECKING:
    from pcx.experiments.methods import Method

RATE, RATED = 0.3, ("vpt", "linear")
MORE = {"bias", "learn_cls", "location"}  # arguments that may train parts of the backbone
MethodText = Annotated[
    str,
    typer.Option(
        help=f"one of {', '.join(METHODS)}; with arguments as adapter:reduction=64,init=published"
    ),
]
Prompts = Annotated[
    str,
    typer.Option(help="of vpt: number per layer, for all or one each, as 8,8,4; 0 is allowed"),
]
TrainingSplit = Annotated[
    str, o.option("train, with val for choosing settings, or trainval", o.DATA)
]


def train(
    ctx: typer.Context,
    photos: o.Photos = None,
    task: o.TaskName = None,
    out: Annotated[
        Path | None,
        typer.Option(help="file for prompts and head; by default the task's name.safetensors"),
    ] = None,
    backbone: o.Backbone = o.EMBEDDED,
    weights: o.Weights = None,
    method: MethodText = "vpt",
    prompts: Prompts = "20",
    kind: Annotated[str, typer.Option(help="of vpt: deep, shallow or prefix")] = "deep",
    dropout: Annotated[float, typer.Option(help="of vpt: share of prompt elements")] = 0.0,
    epochs: o.Epochs = 100,
    lr: o.Rate = None,
    base_lr: o.BaseRate = None,
    weight_decay: o.WeightDecay = 1e-3,
    batch_size: o.BatchSize = 64,
    split: TrainingSplit = "train",
    head_init: Annotated[str, typer.Option(help=", ".join(HEAD_INITS))] = HEAD_INITS[0],
    clip_grad: o.ClipGrad = None,
    class_weights: o.Weighing = None,
    patience: o.Patience = None,
    root: o.Root = None,
    amp: o.Amp = "no",
    execution: o.Execution = "auto",
    seed: o.Seed = 0,
    workers: o.Workers = 0,
    cache: o.Cache = None,
    cache_tokens: o.CacheTokens = False,
    top5: o.TopFive = False,
    track: o.Track = None,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    config: o.Config = None,
) -> None:
    """Trains a method on a task: the parameters that it adds to the backbone, and the head."""
    import torch

    import pcx
    from pcx.experiments.methods import build_method

    name = o.one_task(photos, task)
    out = _checked_out(out or _default_out(name), split, replaced=overwrite or resume)
    chosen = _method(ctx, method, {"num_prompts": prompts, "kind": kind, "dropout": dropout})
    data = o.new_task(name, o.backbone_data_config(backbone, weights), root, cache)
    if lr is None and base_lr is None:
        lr, clip_grad = _default_rate(chosen, clip_grad)
    objective = _objective(class_weights, data, split, top5)
    followed = _followed(patience, split, track, out, objective.metric)
    torch.manual_seed(seed)
    plain = o.new_backbone(backbone, data.num_classes, weights, data.objective)
    loader = data.loader(split, batch_size, num_workers=workers)
    model: Any = build_method(chosen, plain, loader, head_init=head_init)
    o.set_task(model, data)
    val = data.loader("val", batch_size, num_workers=workers) if split == "train" else None
    history = pcx.fit(
        model,
        loader,
        epochs=epochs,
        lr=lr,
        base_lr=base_lr,
        val_loader=val,
        weight_decay=weight_decay,
        clip_grad=clip_grad,
        objective=objective,
        amp=amp,
        execution=execution,
        cache="tokens" if cache_tokens else None,
        **followed,
        seed=seed,
        checkpoint_dir=o.run_folder_of(out),
        resume=resume,
        overwrite=overwrite,
    )
    o.check_converged(history, data.num_classes, model.record.trained_lr)
    pcx.save(model, out)
    o.say(f"wrote {out}")
    o.say_accuracy(model, data, batch_size, amp, workers=workers, trained_on=split, top5=top5)


def _objective(weights: str | None, data: Any, split: str, top5: bool) -> Any:
    """That of the task; of one class per image with the weights and metrics that are asked for."""
    from pcx.training.class_weights import balanced_weights, labels_in
    from pcx.training.objectives import SingleLabel, objective_for

    o.check_one_class(data, {"--class-weights": weights, "--top5": top5})
    if data.objective != SingleLabel.name:
        return objective_for(data.objective)
    if top5 and data.num_classes <= 5:
        raise ValueError(
            f"--top5: {data.name} has {data.num_classes} classes, expected 6 or more; leave it out"
        )
    values: Any = None
    if weights == "balanced":
        values = balanced_weights(labels_in(data.splits[split]), data.num_classes)
    elif weights is not None:
        try:
            values = [float(part) for part in weights.split(",")]
        except ValueError:
            raise ValueError(
                f"--class-weights: {weights!r}, expected balanced, or numbers as 1,2,0.5"
            ) from None
    if values is not None and len(values) != data.num_classes:
        raise ValueError(
            f"--class-weights: {len(values)} weights for {data.num_classes} classes; give one for "
            "each class, or balanced"
        )
    return SingleLabel(class_weights=values, top=5 if top5 else None)


def _followed(
    patience: int | None, split: str, track: list[str] | None, out: Path, metric: str
) -> dict:
    """The arguments of fit that show a training to trackers, and that end it early."""
    from pcx.training.callbacks import Callback, EarlyStopping
    from pcx.training.trackers import Tracker

    called: list[Callback] = [Tracker(track, folder=o.run_folder_of(out))] if track else []
    if patience is None:
        return {"callbacks": called}
    if split != "train":
        raise ValueError(f"--patience: it goes by val, which --split {split} trains on; use train")
    best = f"val_{metric}"
    return {"best": best, "callbacks": [*called, EarlyStopping(best, patience)]}


def _default_out(task: str) -> Path:
    """The file of a task's name, such as photos.safetensors of ../photos."""
    name = Path(task).expanduser().resolve().name if Path(task).is_dir() else task
    return Path(f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name).strip('-') or 'model'}.safetensors")


def _default_rate(method: Any, clip_grad: float | None) -> tuple[float, float]:
    """A rate that suits prompts and heads over most backbones where gradients are clipped.

    Raises:
        ValueError: the method trains more than prompts and a head, whose rate depends on more.
    """
    if method.name not in RATED or MORE & set(method.arguments):
        raise ValueError(
            f"lr: give lr or base_lr; --method {method.text} has no rate of its own, and pcx "
            "compare finds one on val"
        )
    clip_grad = 1.0 if clip_grad is None else clip_grad
    o.say(f"learning rate {RATE}, gradients clipped to norm {clip_grad:g}; --lr sets another")
    return RATE, clip_grad


def _checked_out(out: Path, split: str, *, replaced: bool) -> Path:
    """The file; a ValueError where options do not fit, before anything is read."""
    o.check_out(out, replaced=replaced)
    if split not in ("train", "trainval"):
        raise ValueError(f"--split: got {split!r}, expected train or trainval")
    return out


def _method(ctx: typer.Context, text: str, options: dict[str, Any]) -> Method:
    """The method of a text, with the arguments that have options of their own.

    Args:
        ctx: of the command.
        text: of --method.
        options: their values, by the argument's name.

    Raises:
        ValueError: an option is given that the method does not have, or that its text gives too.
    """
    from pcx.experiments.methods import parse_method

    method, arguments = parse_method(text), {}
    for argument, value in options.items():
        option = {"num_prompts": "prompts"}.get(argument, argument)
        if getattr(ctx.get_parameter_source(option), "name", None) != "DEFAULT":
            if not method.takes(argument):
                raise ValueError(
                    f"--{option}: --method {method.name} has no such option; leave it out"
                )
            if argument in method.arguments:
                raise ValueError(f"--{option}: --method {text} gives it too; leave one out")
        if method.takes(argument) and argument not in method.arguments:
            arguments[argument] = value
    if "num_prompts" in arguments:
        arguments["num_prompts"] = o.one_or_more("prompts", arguments["num_prompts"], int)
    return method.with_arguments(arguments)
