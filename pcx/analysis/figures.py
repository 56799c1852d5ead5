"""Charts of a condensation, of the demo, and of a comparison of methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from pcx.analysis.charts import Bars, Lines, Points, Series

if TYPE_CHECKING:
    from pcx.models.record import Condensation

KEPT, ACCURACY = "prompts kept, %", "test accuracy, %"


def kept_per_layer(before: Sequence[int], after: Sequence[int]) -> Bars:
    """The prompts of each layer before and after selection (Prompt Condensation, Fig. 7)."""
    return Bars(
        "kept_per_layer",
        "Prompts of each layer",
        x="layer",
        y="prompts",
        groups=tuple(str(layer) for layer in range(1, len(before) + 1)),
        bars={
            "before": tuple((float(count), None) for count in before),
            "kept": tuple((float(count), None) for count in after),
        },
    )


def score_distribution(condensation: Condensation) -> Points:
    """All prompts' scores from the highest on, and the cut if the scope is global."""
    flat = torch.cat(list(condensation.scores))
    layer = torch.cat([torch.full((len(s),), i) for i, s in enumerate(condensation.scores)])
    order = flat.argsort(descending=True).tolist()
    is_global = condensation.scope == "global"
    return Points(
        "scores",
        "Scores of all prompts",
        x="prompt, by rank over all layers",
        y=f"score ({condensation.method})",
        points=tuple((float(flat[i]), int(layer[i]) + 1) for i in order),
        colour="layer",
        cut=sum(map(len, condensation.kept)) - 0.5 if is_global else None,
    )


def accuracy_by_keep(result: dict) -> Lines:
    """Accuracy against the share of prompts kept (Prompt Condensation, Fig. 4).

    Args:
        result: the results of one task, as `pcx.experiments.demo.demo` returns them.
    """
    accuracy, error = result["accuracy"], result["standard_error"]
    rows = result["accuracy_by_keep"]
    lines = {
        "condensed, fine-tuned": [r["finetuned"] for r in rows if "finetuned" in r],
        "condensed, not fine-tuned": [r["not_finetuned"] for r in rows if "not_finetuned" in r],
        "VPT with so many": [r["trained"] for r in rows if "trained" in r],
    }
    shares = {
        label: [100 * r["keep"] for r in rows if key in r]
        for label, key in zip(lines, ("finetuned", "not_finetuned", "trained"), strict=True)
    }
    return Lines(
        "accuracy_by_keep",
        "Accuracy by the share of prompts kept",
        "Bars are standard errors over the test images.",
        x=KEPT,
        y=ACCURACY,
        series=tuple(
            Series(
                label,
                tuple(
                    (x, p["accuracy"], p["standard_error"])
                    for x, p in zip(shares[label], points, strict=True)
                ),
            )
            for label, points in lines.items()
        ),
        levels={
            "VPT, all prompts": (accuracy["vpt"], error["vpt"]),
            "linear probe": (accuracy["linear"], error["linear"]),
        },
    )


def accuracy_by_parameters(points: Mapping[str, tuple[float, float, float | None]]) -> Lines:
    """Accuracy against trained parameters, without the heads (VPT paper, Fig. 3).

    Args:
        points: by method, its parameters, its accuracy in percent, and half an interval or None.
    """
    return Lines(
        "compare",
        "Accuracy by trained parameters",
        x="trained parameters, without the head",
        y=ACCURACY,
        series=tuple(Series(method, (point,)) for method, point in points.items()),
        log=True,
    )
