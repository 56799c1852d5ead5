"""Draws figures of a condensation, and of a comparison of methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pcx.extras import need

if TYPE_CHECKING:
    from pcx.models.record import Condensation


def kept_per_layer(before: Sequence[int], after: Sequence[int], file: Path) -> None:
    """Draws the prompts of each layer before and after selection (Prompt Condensation, Fig. 7)."""
    figure, axes = _figure("layer", "prompts")
    layers = range(1, len(before) + 1)
    axes.bar(layers, before, color="0.85", label="before")
    axes.bar(layers, after, color="C0", label="kept")
    axes.set_xticks(list(layers))
    axes.legend()
    _write(figure, file)


def score_distribution(condensation: Condensation, file: Path) -> None:
    """Draws all prompts' scores from the highest on, and the cut if the scope is global."""
    figure, axes = _figure("prompt, by rank over all layers", f"score ({condensation.method})")
    flat = torch.cat(list(condensation.scores))
    layer = torch.cat([torch.full((len(s),), i) for i, s in enumerate(condensation.scores)])
    order = flat.argsort(descending=True)
    drawn = axes.scatter(range(len(flat)), flat[order], c=layer[order] + 1, s=10, cmap="viridis")
    figure.colorbar(drawn, label="layer")
    if condensation.scope == "global":
        cut = sum(map(len, condensation.kept)) - 0.5
        axes.axvline(cut, color="0.5", linestyle="--", label=f"kept: {condensation.keep}")
        axes.legend()
    axes.set_yscale("log")
    _write(figure, file)


def accuracy_by_keep(result: dict, file: Path) -> None:
    """Draws accuracy against the share of prompts kept (Prompt Condensation, Fig. 4).

    Args:
        result: the results of one task, as `pcx.experiments.demo.demo` returns them.
        file: where the figure is written; the name's ending says the format.
    """
    figure, axes = _figure("prompts kept, %", "test accuracy, %")
    rows = result["accuracy_by_keep"]
    error = result["standard_error"]["vpt"]
    for key, label in (("finetuned", "fine-tuned"), ("not_finetuned", "not fine-tuned")):
        points = [(100 * r["keep"], r[key]) for r in rows if key in r]
        axes.errorbar(*zip(*points, strict=True), yerr=error, marker="o", capsize=3, label=label)
    axes.axhline(result["accuracy"]["linear"], color="0.5", linestyle=":", label="linear probe")
    axes.legend()
    _write(figure, file)


def accuracy_by_parameters(
    points: Mapping[str, tuple[float, float, float | None]], file: Path
) -> None:
    """Draws accuracy against trained parameters, without the heads (VPT paper, Fig. 3).

    Args:
        points: by method, its parameters, its accuracy in percent, and half an interval or None.
        file: where the figure is written; the name's ending says the format.
    """
    figure, axes = _figure("trained parameters, without the head", "test accuracy, %")
    for method, (parameters, accuracy, half) in points.items():
        axes.errorbar([parameters], [accuracy], yerr=[half or 0], fmt="o", capsize=3, label=method)
    most = max(parameters for parameters, *_ in points.values())
    axes.set_xscale("symlog", linthresh=1000)  # a linear probe has none
    axes.set_xticks([0, *(10**k for k in range(3, len(str(round(most))) + 1))])
    axes.set_xlim(left=-200)
    figure.legend(loc="outside right upper", fontsize=7)
    _write(figure, file)


def _figure(x: str, y: str):
    need("matplotlib", "a figure")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _write(figure: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
