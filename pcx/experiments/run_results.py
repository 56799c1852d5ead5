"""What a run's folder holds, for a report: of a study, of a comparison, or of one training."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pcx.analysis.charts import Bars, Chart, Lines, Series
from pcx.condensation.scores_file import SCORES
from pcx.experiments.results import RESULTS, Results, read_results
from pcx.training.run_folder import CONFIG, HISTORY

_SERIES = (("loss", "val_loss"), ("accuracy", "val_accuracy"))


def results_in(folder: Path) -> Results:
    """The results in a folder.

    Raises:
        ValueError: it is no folder of a run, or what is in it is not whole; one line.
    """
    if (folder / RESULTS).exists():
        return read_results(folder)
    if (folder / HISTORY).exists():
        return _of_training(folder)
    if (folder / CONFIG).exists():
        raise ValueError(f"{folder}: the run is not finished; run it to its end first")
    raise ValueError(f"{folder}: no folder of a run: it has no {RESULTS} and no {HISTORY}")


def _of_training(folder: Path) -> Results:
    try:
        with open(folder / HISTORY, newline="", encoding="utf-8") as file:
            rows = [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(file)]
        if not rows or "epoch" not in rows[0]:
            raise ValueError("no epoch in it")
        charts: list[Chart] = [_curves(rows, names) for names in _SERIES if names[0] in rows[0]]
        if (folder / SCORES).exists():
            charts.append(_kept(json.loads((folder / SCORES).read_text())))
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder}: its {HISTORY} or {SCORES} is not whole ({error})") from None
    notes = [f"{len(rows)} epochs."]
    return Results("train", f"Training in {folder.name}", charts=charts, notes=notes)


def _number(text: str | None) -> float | None:
    return float(text) if text not in (None, "") else None  # type: ignore[arg-type]


def _curves(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Lines:
    series = []
    for name in names:
        points = [(r["epoch"], r[name], None) for r in rows if r.get(name) is not None]
        if points:
            series.append(Series(name.replace("_", " "), tuple(points)))
    return Lines(
        names[0], f"{names[0].capitalize()} by epoch", x="epoch", y=names[0], series=tuple(series)
    )


def _kept(content: Mapping[str, Any]) -> Bars:
    counts = [[len(row[name]) for row in content["layers"]] for name in ("scores", "kept")]
    return Bars(
        "kept_per_layer",
        "Prompts of each layer",
        f"By {content['method']}, {content['scope']}.",
        x="layer",
        y="prompts",
        groups=tuple(str(i + 1) for i in range(len(counts[0]))),
        bars={
            name: tuple((float(count), None) for count in each)
            for name, each in zip(("before", "kept"), counts, strict=True)
        },
    )
