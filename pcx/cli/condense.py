"""The command `pcx condense`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pcx.cli import options as o

if TYPE_CHECKING:
    from pcx.models.vpt.model import VPT


def condense(
    model: o.ModelFile,
    photos: o.Photos = None,
    task: o.TaskName = None,
    out: Annotated[
        Path | None,
        typer.Option(help="file for the condensed model; by default beside it, '-condensed'"),
    ] = None,
    keep: Annotated[str, typer.Option(help="a fraction, a count, or auto")] = "0.3",
    backbone: o.FileBackbone = None,
    weights: o.Weights = None,
    method: Annotated[str, typer.Option(help="scoring method, such as taylor or gate")] = "taylor",
    scope: Annotated[str, typer.Option(help="global or local")] = "global",
    epochs: o.Epochs = 20,
    lr: Annotated[
        float | None,
        o.option("learning rate; a tenth of the training's by default", o.OPTIMISATION),
    ] = None,
    batch_size: o.BatchSize = 64,
    split: o.Split = "train",
    clip_grad: o.ClipGrad = None,
    root: o.Root = None,
    amp: o.Amp = "no",
    execution: o.Execution = "auto",
    seed: o.Seed = 0,
    workers: o.Workers = 0,
    cache: o.Cache = None,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    config: o.Config = None,
) -> None:
    """Scores, selects and fine-tunes prompts (Prompt Condensation, Algorithm 1)."""
    from pcx.checkpoints.saving import save
    from pcx.condensation.condensing import condense as condense_model
    from pcx.condensation.scoring import check_prompted

    name = o.one_task(photos, task)
    out = out or model.with_name(f"{model.stem}-condensed.safetensors")
    o.check_out(out, replaced=overwrite or resume)
    if keep == "auto" and split != "train":
        raise ValueError(
            f"--split: {split!r} holds the images of val, by which --keep auto chooses; use train"
        )
    whole = o.loaded_model(model, backbone, weights)
    check_prompted(whole)
    data = o.task_for(whole, name, root, cache)
    _say_cost(whole)
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
        objective=data.objective,
        amp=amp,
        execution=execution,
        seed=seed,
        checkpoint_dir=o.run_folder_of(out),
        resume=resume,
        overwrite=overwrite,
    )
    save(small, out)
    o.say(f"kept {small.counts} of {whole.counts}; wrote {out}")
    o.say_accuracy(small, data, batch_size, amp, workers=workers, trained_on=split)


def _say_cost(model: VPT) -> None:
    """Prints the share of prompts among the tokens, and the operations that they add."""
    from pcx.analysis.prompt_cost import token_cost

    cost = token_cost(model)
    folded, concat = _percent(cost["folded_flops"]), _percent(cost["concat_flops"])
    o.say(
        f"prompts are {cost['relative_tokens']:.0f}% of the image's tokens; folded they add "
        f"{folded} operations, concatenated {concat}"
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}%"


def _keep(text: str) -> float | int | str:
    if text == "auto":
        return text
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise ValueError(f"--keep: {text!r}, expected a fraction, a count or auto") from None
