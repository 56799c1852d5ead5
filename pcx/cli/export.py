"""The command `pcx export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pcx.cli import options as o


def export(
    model: o.ModelFile,
    out: Annotated[Path, typer.Option(help="the file, which ends in .onnx, .pt2 or .ts")],
    format: Annotated[
        str | None,
        typer.Option(help="onnx, exported, aoti or torchscript; by default what --out ends in"),
    ] = None,
    backbone: o.FileBackbone = None,
    weights: o.Weights = None,
    overwrite: Annotated[bool, o.option("replace an existing file", o.RUN)] = False,
    config: o.Config = None,
) -> None:
    """Writes a saved model to a file that runs without pcx.

    The file is ONNX (.onnx), a program of torch.export (.pt2), a package of AOTInductor (.pt2 with
    --format aoti) or TorchScript (.ts). It takes batches of any size. Before it is written its
    logits are compared with the model's on random images.
    """
    from pcx.deployment.exporting import check_target, export

    _, name = check_target(out, format, ("--out", "--format"))
    o.check_file(out, replaced=overwrite)
    export(o.loaded_model(model, backbone, weights), out, format=name)
    o.say(f"{out}: {name}, {out.stat().st_size / 1e6:.1f} MB, its logits are those of the model")
