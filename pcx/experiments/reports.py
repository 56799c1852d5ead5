"""The tables and the figure of a comparison."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from pcx.analysis import figures
from pcx.checkpoints.files import written_whole
from pcx.experiments import averages
from pcx.experiments.compare import Comparison, Row
from pcx.experiments.results import write_rows

CSV, MARKDOWN, FIGURE = "compare.csv", "compare.md", "compare.png"
ON_CPU = "Peak memory is a GPU's; a CPU has no such figure, and its column is empty."
FEWEST = 5  # tasks under which no p of the signed-rank test is under 0.05
EMPTY = "-"


def write_reports(found: Comparison, folder: Path) -> None:
    """Writes compare.csv, compare.md and compare.png."""
    write_rows([csv_row(row) for row in found.rows], folder / CSV)
    with written_whole(folder / MARKDOWN) as part:
        part.write_text(markdown(found), encoding="utf-8")
    points = {
        method: (
            statistics.fmean(row.parameters for row in found.of_method(method)),
            *found.average(method, averages.mean_of_tasks),
        )
        for method in found.methods
    }
    figures.accuracy_by_parameters(points).write_picture(folder / FIGURE)


def csv_row(row: Row) -> dict[str, Any]:
    """A row as compare.csv has it; what is not known is empty."""
    return {
        "task": row.task,
        "group": averages.group_of(row.task),
        "method": row.method,
        **row.cell._asdict(),
        "cells": row.cells,
        "diverged_cells": row.diverged,
        "edge": row.edge,
        "val_accuracy": round(row.val_accuracy, 3),
        "accuracies": " ".join(f"{value:.3f}" for value in row.accuracies),
        "mean": round(row.mean, 3),
        "interval_95": None if row.interval is None else round(row.interval, 3),
        "parameters": row.parameters,
        "parameters_with_head": row.parameters + row.head_parameters,
        "ms_per_step": None if row.ms_per_step is None else round(row.ms_per_step, 3),
        "peak_mib": None if row.peak_mib is None else round(row.peak_mib, 1),
    }


def overview(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """The columns and the lines of the table with one line for each method."""
    averaged = len(found.tasks) > 1
    columns = ["method", *found.tasks]
    columns += ["mean of groups", "mean of tasks"] if averaged else []
    columns += ["parameters", "with head", "ms/step", "peak MiB"]
    lines = []
    for method in found.methods:
        rows = found.of_method(method)
        line = [method, *(plus_minus(row.mean, row.interval) for row in rows)]
        if averaged:
            line.append(plus_minus(*found.average(method, averages.mean_of_groups)))
            line.append(plus_minus(*found.average(method, averages.mean_of_tasks)))
        line.append(_range([row.parameters for row in rows]))
        line.append(_range([row.parameters + row.head_parameters for row in rows]))
        line.append(_median([row.ms_per_step for row in rows], ".1f"))
        line.append(_median([row.peak_mib for row in rows], ".0f"))
        lines.append(line)
    return columns, lines


def table(found: Comparison) -> Table:
    """The overview for a terminal."""
    columns, lines = overview(found)
    drawn = Table(title="test accuracy in percent, ± 95% interval over seeds")
    for column in columns:
        drawn.add_column(column, justify="left" if column == "method" else "right")
    for line in lines:
        drawn.add_row(*line)
    return drawn


def markdown(found: Comparison) -> str:
    """The whole report: overview, groups, chosen cells, and tests between methods."""
    parts = ["# Comparison", "", *_notes(found), "", *_table(*overview(found))]
    groups = averages.groups_of(found.tasks)
    if len(groups) > 1:
        parts += ["", "## Groups", "", *_table(*_groups(found, groups))]
    parts += ["", "## What val chose", "", *_table(*_chosen(found))]
    if len(found.tasks) > 1 and len(found.methods) > 1:
        parts += ["", "## Tests between methods", "", *_tests(found)]
    return "\n".join(parts) + "\n"


def _notes(found: Comparison) -> list[str]:
    settings, first = found.settings, found.rows[0]
    seeds = len(first.accuracies)
    notes = [
        f"- {settings['backbone']}, {settings['epochs']} epochs, batch {settings['batch_size']}, "
        f"amp {settings['amp']}, head {settings['head_init']}, on {settings['device']}.",
        "- Rate, decay and clipping are chosen by the last epoch's accuracy on val. The chosen "
        "cell is trained anew on train and val, and tested once, at its last epoch.",
        f"- {seeds} seeds; ± is half a 95% t-interval over them. Averages have the interval of "
        "their own values of each seed."
        if seeds > 1
        else "- One seed, so that there are no intervals.",
        "- Parameters are those that are trained, without the head, as the papers count them.",
        "- ms/step is the median from step to step, with the loader's part, of the first seed's "
        "training on train and val, beside which no other ran.",
    ]
    notes += [f"- {said}" for said in remarks(found)]
    return notes


def remarks(found: Comparison) -> list[str]:
    """What a reader of the table must know."""
    said = [] if any(row.peak_mib for row in found.rows) else [ON_CPU]
    edges = [f"{row.method} on {row.task} ({row.edge})" for row in found.rows if row.edge]
    if found.of_pixels:
        said.append(
            f"Of {', '.join(found.of_pixels)} the accuracy is the mean intersection over union."
        )
    if edges:
        said.append(
            f"A wider grid may do better where the chosen rate is at the grid's edge: "
            f"{', '.join(edges)}."
        )
    return said


def _groups(found: Comparison, groups: dict[str, list[str]]) -> tuple[list[str], list[list[str]]]:
    lines = []
    for method in found.methods:
        rows = {row.task: row.mean for row in found.of_method(method)}
        means = [statistics.fmean(rows[task] for task in tasks) for tasks in groups.values()]
        whole = [averages.mean_of_groups(rows), averages.mean_of_tasks(rows)]
        lines.append([method, *(f"{value:.2f}" for value in [*means, *whole])])
    names = [f"{group} ({len(tasks)})" for group, tasks in groups.items()]
    return ["method", *names, "mean of groups", "mean of tasks"], lines


def _chosen(found: Comparison) -> tuple[list[str], list[list[str]]]:
    columns = ["task", "method", "cell", "rate of the grid", "val", "cells", "diverged", "seeds"]
    lines = [
        [
            row.task,
            row.method,
            str(row.cell),
            row.edge or EMPTY,
            f"{row.val_accuracy:.2f}",
            str(row.cells),
            str(row.diverged),
            " ".join(f"{value:.2f}" for value in row.accuracies),
        ]
        for row in found.rows
    ]
    return columns, lines


def _tests(found: Comparison) -> list[str]:
    said = (
        "Each number is the p of Wilcoxon's one-tailed signed-rank test over "
        f"{len(found.tasks)} tasks that the method of the line is better than that of the column."
    )
    if len(found.tasks) < FEWEST:
        said += f" With fewer than {FEWEST} tasks no p is under 0.05."
    lines = [
        [method, *(EMPTY if o == method else f"{found.p_value(method, o):.2g}" for o in others)]
        for others in [found.methods]
        for method in found.methods
    ]
    return [said, "", *_table(["method", *found.methods], lines)]


def plus_minus(mean: float, half: float | None) -> str:
    """A mean and half its interval, where it has one."""
    return f"{mean:.2f}" if half is None else f"{mean:.2f} ± {half:.2f}"


def _range(counts: Sequence[int]) -> str:
    least, most = min(counts), max(counts)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def _median(values: Iterable[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return format(statistics.median(known), form) if known else EMPTY


def _table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    rows = [columns, ["---"] * len(columns), *lines]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
