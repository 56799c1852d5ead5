"""The command `pcx demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pcx.cli.options import Config, Seed


def demo(
    out: Annotated[Path, typer.Option(help="folder for results")] = Path("runs/demo"),
    seed: Seed = 0,
    config: Config = None,
) -> None:
    """VPT and Prompt Condensation on data in the package; minutes on two CPU cores."""
    from pcx.experiments.demo import demo as run_demo

    run_demo(out, seed=seed)
