"""Options that change the grids of a search, and what reads them."""

from __future__ import annotations

from typing import Annotated, Any

from pcx.cli.options import option

GRID = "Grid"
Rates = Annotated[
    str | None, option("rates, as 0.01,0.1; by default the method's or the suite's own", GRID)
]
Decays = Annotated[str | None, option("decays, as 0,0.01", GRID)]
Clips = Annotated[str | None, option("norms to clip to, as none,1", GRID, "--grid-clip-grad")]
Opt = Annotated[str | None, option("the optimiser, such as momentum or adamw", GRID)]


def grid_changes(lr: str | None, decay: str | None, clip: str | None, opt: str | None) -> Any:
    """The changes to grids that the options of the panel "Grid" ask for."""
    from pcx.experiments.grids import Changes

    return Changes(
        _numbers("grid-lr", lr),
        _numbers("grid-weight-decay", decay),
        _numbers("grid-clip-grad", clip, none=True),
        opt,
    )


def _numbers(name: str, text: str | None, *, none: bool = False) -> Any:
    """The numbers of a list, in which "none" may stand for none."""
    if text is None:
        return None
    found: list[float | None] = []
    for part in (part.strip() for part in text.split(",")):
        try:
            found.append(None if none and part == "none" else float(part))
        except ValueError:
            raise ValueError(
                f"--{name}: {text!r}, expected numbers as {'none,1' if none else '0.01,0.1'}"
            ) from None
    return found
