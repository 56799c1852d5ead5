"""The command `pcx report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pcx.cli import options as o


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="folders of pcx study, compare, train or condense"),
    ],
    out: Annotated[
        Path | None, typer.Option(help="the page; by default report.html in the first folder")
    ] = None,
    config: o.Config = None,
) -> None:
    """Writes one HTML page of runs, which needs no network: figures, tables, findings, pictures."""
    from pcx.experiments.report import read_runs, write_report
    from pcx.extras import need

    need("matplotlib", "pcx report")
    found, failures = read_runs(runs)
    file = (found[0].folder if found else runs[0]) / "report.html" if out is None else out
    write_report(found, failures, file)
    for what, why in failures:
        o.say(f"failed: {what}: {why}")
    o.say(f"wrote {file}")
    if failures:
        raise typer.Exit(1)
