"""Suites: what `pcx study` can run, one file each."""

from __future__ import annotations

from pcx.registry import Registry

__all__ = ["SUITES"]

# A new suite is one file in this folder and one line here: a name, and an object with `title`,
# `options` and `run(request)`, see `pcx.experiments.suites.requests`.
SUITES = Registry(
    "suite",
    {
        "sprites": "pcx.experiments.suites.prompts:SPRITES",
        "digits": "pcx.experiments.suites.prompts:DIGITS",
        "vtab": "pcx.experiments.suites.prompts:VTAB",
        "fgvc": "pcx.experiments.suites.prompts:FGVC",
    },
)
