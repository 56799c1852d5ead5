"""Options that several commands share, and functions that read them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from pcx.cli.config_file import use_config

if TYPE_CHECKING:
    from torch import nn

    from pcx.tasks import Task

EMBEDDED = "pcx_scenes_vit"  # equals pcx.backbones.NAME; importing that would import torch
WORSE = 10.0  # times the loss of guessing, from which on a training has diverged
BACKBONE, DATA, OPTIMISATION, RUN = "Backbone", "Data", "Optimisation", "Run"


def option(help: str, panel: str, *names: str) -> Any:
    """An option that `--help` lists under the heading `panel`."""
    return typer.Option(*names, help=help, rich_help_panel=panel)


# Backbone
Backbone = Annotated[str, option(f"a timm model name, or {EMBEDDED}, the embedded one", BACKBONE)]
FileBackbone = Annotated[
    str | None, option("a timm model name; by default the one that the file names", BACKBONE)
]
Weights = Annotated[
    Path | None, option("a file of the backbone's weights, in place of timm's download", BACKBONE)
]
ModelFile = Annotated[Path, typer.Argument(help="a file that pcx train or condense wrote")]

# Data
Photos = Annotated[
    str | None,
    typer.Argument(
        metavar="[PHOTOS]", help="a folder of photos, with a folder for each class in it"
    ),
]
TaskName = Annotated[
    str | None,
    option(
        "in place of photos: digits, sprites:..., vtab:..., fgvc:..., or timm's name",
        DATA,
        "--task",
    ),
]
Root = Annotated[Path | None, option("folder of data sets on disk", DATA)]
Split = Annotated[str, option("train, val, trainval or test", DATA)]
HeldOut = Annotated[
    str | None, option("train, val, trainval or test; by default test, or val without one", DATA)
]
BatchSize = Annotated[int, option("images in a batch", DATA)]
Workers = Annotated[int, option("processes that read images", DATA)]
Cache = Annotated[
    Path | None, option("folder that keeps images decoded and resized, for all runs", DATA)
]
CacheTokens = Annotated[
    bool, option("compute patch tokens once for each image; no random transforms", DATA)
]

# Optimisation
Epochs = Annotated[int, option("passes over the training data", OPTIMISATION)]
Rate = Annotated[
    float | None,
    option("learning rate, not scaled; 0.3 with --clip-grad 1 by default", OPTIMISATION),
]
BaseRate = Annotated[float | None, option("learning rate, scaled by batch / 256", OPTIMISATION)]
WeightDecay = Annotated[float, option("on prompts and head weight", OPTIMISATION)]
ClipGrad = Annotated[float | None, option("norm to which the gradient is clipped", OPTIMISATION)]
Patience = Annotated[
    int | None,
    option("end after so many epochs without a better validation, and keep the best", OPTIMISATION),
]
Weighing = Annotated[
    str | None,
    option("balanced, or a number for each class, as 1,2,0.5", OPTIMISATION, "--class-weights"),
]
Track = Annotated[
    list[str] | None,
    option("tensorboard, wandb, mlflow, ...; may be given several times", RUN, "--track"),
]
TopFive = Annotated[
    bool, option("also how often the class is among the five likeliest", RUN, "--top5")
]
Amp = Annotated[str, option("no, bf16 or fp16", OPTIMISATION)]
Execution = Annotated[str, option("auto, eager, cuda-graph or compile", OPTIMISATION)]
Seed = Annotated[int, option("seed of all random numbers", OPTIMISATION)]

# Run
Storage = Annotated[
    str | None,
    option(
        "Optuna's, as sqlite:///study.db, or a journal file, as study.log; several processes and "
        "machines can share it",
        RUN,
    ),
]
Resume = Annotated[bool, option("continue from the run's checkpoint", RUN)]
Overwrite = Annotated[bool, option("replace an existing file and its run's checkpoint", RUN)]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="a TOML file of options, at the top level or in a table named after the command; "
        "options given here win over it",
        is_eager=True,
        callback=use_config,
        rich_help_panel=RUN,
    ),
]
Ranking = Annotated[str, typer.Option(help="pagerank, cls, average or random")]


def new_backbone(
    name: str, num_classes: int, weights: Path | None = None, objective: str = "single-label"
) -> nn.Module:
    """Builds the embedded backbone, or a model of timm with timm's weights or a file's.

    For the objective "segmentation" it gets SETR's decoder.
    """
    from pcx.backbones.building import build_backbone

    _check_backbone(name, weights)
    setr: dict | None = {} if objective == "segmentation" else None
    return build_backbone(name, num_classes=num_classes, weights=weights, setr=setr)


def backbone_data_config(name: str, weights: Path | None = None) -> dict:
    """The image settings that a backbone expects, found without reading its weights.

    The backbone itself must be built after the task is loaded, with the task's number of classes.
    Otherwise a seed would not give the same head.
    """
    import timm
    from accelerate import init_empty_weights

    from pcx.backbones import scenes_vit
    from pcx.backbones.inputs import data_config

    _check_backbone(name, weights)
    with init_empty_weights():
        if name == EMBEDDED:
            return data_config(scenes_vit(0, pretrained=False))
        return data_config(timm.create_model(name, pretrained=False, num_classes=0))


def _check_backbone(name: str, weights: Path | None) -> None:
    import timm

    if name == EMBEDDED:
        if weights is not None:
            raise ValueError(f"--weights: {EMBEDDED} has its own weights; give --backbone as well")
        return
    if not timm.is_model(name):
        raise ValueError(f"--backbone: timm knows no {name!r}; see timm.list_models()")
    if weights is not None and not weights.is_file():
        raise FileNotFoundError(f"--weights: no file {weights}; give the path of a weights file")


def loaded_model(file: Path, backbone: str | None, weights: Path | None) -> Any:
    """Loads a saved model on the backbone of that name, or on the one that its file names."""
    from pcx.checkpoints.saving import backbone_in, load

    if backbone is None and weights is None:
        return load(file)
    named = backbone_in(file)["name"] if backbone is None else backbone
    return load(file, new_backbone(named, 0, weights))


def check_out(out: Path, *, replaced: bool) -> None:
    """Checks before anything is computed that the file of a run can be written.

    Args:
        out: the file.
        replaced: whether it and its run's checkpoint may exist already.

    Raises:
        ValueError: as `check_file`, or a run that was stopped has its checkpoint beside it.
    """
    from pcx.training.checkpoint import LAST

    check_file(out, replaced=replaced, hint=" (--resume continues its run)")
    run = run_folder_of(out)
    if (run / LAST).exists() and not replaced:
        raise ValueError(
            f"--out: {run} holds the checkpoint of a run that has not written {out.name}; give "
            "--resume to continue it, --overwrite to replace it, or another name"
        )


def check_file(out: Path, *, replaced: bool, hint: str = "") -> None:
    """Checks before anything is computed that a file can be written.

    Args:
        out: the file.
        replaced: whether it may exist already.
        hint: what else can be done where it exists, for the message.

    Raises:
        ValueError: it exists, a folder is in its place, or its own folder cannot be written to.
    """
    from pcx.training.run_folder import writable_folder

    if out.is_dir():
        raise ValueError(f"--out: {out} is a folder, expected a file, such as model.safetensors")
    if out.exists() and not replaced:
        raise ValueError(
            f"--out: {out} exists; give --overwrite to replace it, or another name{hint}"
        )
    try:
        writable_folder(out.parent)
    except ValueError as error:
        raise ValueError(str(error).replace("checkpoint_dir", "--out", 1)) from None


def check_converged(history: Sequence[dict], classes: int, lr: float) -> None:
    """Raises a NonFiniteLoss where a training ended far worse than guessing."""
    from pcx.training.losses import NonFiniteLoss

    guessing = math.log(max(classes, 2))
    if history and history[-1]["loss"] > WORSE * guessing:
        raise NonFiniteLoss(
            f"--lr: training diverged: its loss ended at {history[-1]['loss']:.4g}, where guessing "
            f"has {guessing:.3g}; lower the learning rate (now {lr:g}; try {lr / 10:g}), or give "
            "--clip-grad 1. No file was written"
        )


def one_task(photos: str | None, task: str | None) -> str:
    """The task's name, which a folder of photos or --task gives.

    Raises:
        ValueError: both are given, or none.
    """
    given = [name for name in (photos, task) if name is not None]
    if len(given) != 1:
        both = f"got both, {photos} and --task {task}" if given else "got none"
        raise ValueError(f"PHOTOS: {both}; give a folder of photos, or --task")
    return given[0]


def task_for(model: Any, name: str, root: Path | None, cache: Path | None) -> Task:
    """Loads a task for a saved model, and says what was found in a folder of photos.

    Raises:
        ValueError: it has another number of classes than the model has logits, or others.
    """
    from pcx.backbones.inputs import data_config
    from pcx.training.class_names import class_names_of

    task = new_task(name, data_config(model), root, cache)
    if task.num_classes != model.num_classes:
        raise ValueError(
            f"--task: {name} has {task.num_classes} classes, and the model gives "
            f"{model.num_classes} logits; give the task that it was trained on"
        )
    trained, names = model.record.task, class_names_of(task.loader("train"))
    if names is None and model.class_names is None and trained not in (None, task.name):
        raise ValueError(
            f"--task: the model was trained on {trained}, and {name} has as many classes; give "
            f"--task {trained}"
        )
    if model.record.split is not None and task.digest not in (None, model.record.split):
        say(
            "the folder's files are not those that the model was trained with, so that photos of "
            "val and test may be among those it has seen"
        )
    return task


def new_task(name: str, config: dict, root: Path | None, cache: Path | None) -> Task:
    """Loads a task, and says what was found in a folder of photos."""
    from pcx.tasks import load_task

    task = load_task(name, config, root=root, cache=cache)
    if task.found:
        say(f"{task.name}: {task.found}")
    return task


def check_one_class(data: Task, options: Mapping[str, Any]) -> None:
    """Raises a ValueError where an option is given that is for one class per image alone."""
    for option, value in options.items():
        if value and data.objective != "single-label":
            raise ValueError(
                f"{option}: it is for one class per image, and {data.name} is of "
                f"{data.objective}; leave it out"
            )


def set_task(model: Any, task: Task) -> None:
    """Keeps in a new model what it is going to be trained on, and how its images are prepared."""
    model.record.task, model.record.split = task.name, task.digest
    model.record.transform = task.transform


def run_folder_of(out: Path) -> Path:
    """The run folder of a command: the name of the file that it writes, and '.ckpt'."""
    return out.with_name(f"{out.name}.ckpt")


def say(text: str, *, stderr: bool = False) -> None:
    """Prints a line of results, or of what was left out, on the standard error."""
    console = Console(stderr=stderr, soft_wrap=True, highlight=False)
    console.print(printable(text), markup=False)


def printable(text: str) -> str:
    """Text in which bytes of a file's name that are not UTF-8 stand as `\\udcff`, for 0xff."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def say_accuracy(
    model: Any,
    data: Task,
    batch_size: int,
    amp: str,
    split: str | None = None,
    workers: int = 0,
    trained_on: str = "train",
    top5: bool = False,
) -> None:
    """Evaluates a model on a split, the held-out one for None; prints accuracy, or mIoU, and loss.

    Nothing is evaluated where the split was trained on.
    """
    from pcx.training.evaluation import evaluate, standard_error
    from pcx.training.objectives import SingleLabel, objective_for

    check_one_class(data, {"--top5": top5})
    split = split or data.held_out
    if split == trained_on or (split, trained_on) == ("val", "trainval"):
        say(f"{data.name}: no held-out split, since {trained_on} was trained on; not evaluated")
        return
    loader = data.loader(split, batch_size, num_workers=workers)
    objective = SingleLabel(top=5) if top5 else objective_for(data.objective)
    found = evaluate(model, loader, amp=amp, objective=objective)
    if "mean_iou" in found:
        say(
            f"{data.name} {split}: mIoU {found['mean_iou']:.2f}% on {found['samples']} images, "
            f"loss {found['loss']:.4f}"
        )
        return
    near = f", {found['accuracy_top5']:.2f}% among the five likeliest" if top5 else ""
    say(
        f"{data.name} {split}: {found['accuracy']:.2f} ± {standard_error(found):.2f}% "
        f"on {found['samples']} images{near}, loss {found['loss']:.4f}"
    )


def numbers(name: str, text: str, kind: Any) -> list:
    """Parses a list of numbers such as 1,2,3."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--{name}: {text!r}, expected numbers as 1,2,3") from None


def one_or_more(name: str, text: str, kind: Any) -> Any:
    """Parses one number, or a list of numbers such as 1,2,3."""
    found = numbers(name, text, kind)
    return found[0] if len(found) == 1 else found
