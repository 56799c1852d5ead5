"""The command `pcx predict`."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pcx.cli import options as o

if TYPE_CHECKING:
    from pcx.deployment.predicting import Predictions

SUFFIXES = (".csv", ".json")
SKIPPED = 4  # the exit code where some files are no images


def predict(
    images: Annotated[
        list[str], typer.Argument(help="image files, folders of them, or patterns such as '*.jpg'")
    ],
    model: Annotated[Path, typer.Option(help="a file that pcx train or condense wrote")],
    top: Annotated[int, typer.Option(help="classes to give for each image")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="file for the predictions (.csv or .json)")
    ] = None,
    backbone: o.FileBackbone = None,
    weights: o.Weights = None,
    batch_size: o.BatchSize = 64,
    amp: o.Amp = "no",
    workers: o.Workers = 0,
    overwrite: Annotated[bool, typer.Option(help="replace an existing --out")] = False,
    config: o.Config = None,
) -> None:
    """Names and probabilities of photos' classes.

    Files that are no images are listed and skipped; the exit code is 4 then.
    """
    from pcx.deployment.predicting import predict as predict_images

    if out is not None:
        _check_out(out, overwrite)
    loaded = o.loaded_model(model, backbone, weights)
    found = predict_images(
        loaded, images, top=top, batch_size=batch_size, num_workers=workers, amp=amp
    )
    if out is None:
        _print(found)
    else:
        _write(found, out)
        o.say(f"wrote {out}: {len(found)} images")
    for path, why in found.skipped:
        o.say(f"skipped {path}: {' '.join(why.split())}", stderr=True)
    if found.skipped:
        raise typer.Exit(SKIPPED)


def _check_out(out: Path, overwrite: bool) -> None:
    if out.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--out: {out}, expected a name that ends in .csv or .json")
    o.check_file(out, replaced=overwrite)


def _print(found: Predictions) -> None:
    """One line for each image, by which scripts can go: path, then name and percent, by tabs."""
    for row in found:
        said = [f"{n}\t{100 * p:.1f}%" for n, p in zip(row.names, row.probabilities, strict=True)]
        typer.echo(o.printable("\t".join([row.source, *said])))


def _write(found: Predictions, out: Path) -> None:
    """Writes UTF-8, in which other bytes of a name are escaped: JSON reads them back as they were.

    CSV shows the escape, as `printable` does.
    """
    from pcx.checkpoints.files import written_whole

    as_text: Any = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}
    with written_whole(out) as part, open(part, "w", **as_text) as file:
        if out.suffix.lower() == ".json":
            json.dump([_as_json(row) for row in found], file, indent=2, ensure_ascii=False)
            return
        writer = csv.writer(file)
        writer.writerow(["image", "rank", "label", "class", "probability"])
        for row in found:
            for rank, (label, name, p) in enumerate(
                zip(row.labels, row.names, row.probabilities, strict=True), 1
            ):
                writer.writerow([row.source, rank, label, name, f"{p:.6g}"])


def _as_json(row: Any) -> dict[str, Any]:
    classes = [
        {"label": label, "class": name, "probability": p}
        for label, name, p in zip(row.labels, row.names, row.probabilities, strict=True)
    ]
    return {"image": row.source, "classes": classes}
