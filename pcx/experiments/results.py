"""What a study has found: a table of its work, charts, findings, and what failed."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pcx.analysis.charts import Chart, chart_of
from pcx.checkpoints.files import written_whole
from pcx.training.run_folder import write_json

RESULTS, ROWS, FIGURES = "results.json", "results.csv", "figures"
FORMAT = 1


@dataclass(frozen=True)
class Table:
    """A table for readers.

    Attributes:
        name: of its file, without a suffix.
        title: in a few words, with the source's number where it has one.
        columns: their names.
        lines: of numbers and text.
        note: what a reader must know; may be empty.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[Any, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Finding:
    """Whether something that a paper or pcx says holds here.

    Attributes:
        says: in one sentence.
        value: the number that decides.
        least: what it must be at least.
        half: half the width of its 95% interval; None of one seed.
        unit: of the value.
    """

    says: str
    value: float
    least: float
    half: float | None = None
    unit: str = "points"

    @property
    def holds(self) -> bool:
        """Whether the value is as high as it must be."""
        return self.value >= self.least

    @property
    def is_clear(self) -> bool:
        """Whether the whole interval says the same."""
        half = self.half or 0.0
        return self.value - half >= self.least or self.value + half < self.least

    def verdict(self) -> str:
        """In words."""
        return ("holds" if self.holds else "fails") + ("" if self.is_clear else ", within chance")


@dataclass
class Results:
    """What a suite gives.

    Attributes:
        suite: its name.
        title: in a few words.
        rows: the table of all work, one form for all; without times.
        charts, tables, findings: for readers.
        failures: (what, why) of work that failed, each one line.
        notes: what a reader must know.
        looks: pictures of what models attend to, see `pcx.experiments.looks`.
    """

    suite: str
    title: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    looks: list[dict[str, Any]] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Writes results.csv, results.json, and each chart and table to the folder figures."""
        write_rows(self.rows, folder / ROWS)
        for chart in self.charts:
            chart.write(folder / FIGURES)
        for table in self.tables:
            lines = [dict(zip(table.columns, line, strict=True)) for line in table.lines]
            write_rows(lines, folder / FIGURES / f"{table.name}.csv")
        content = {
            "format": FORMAT,
            "suite": self.suite,
            "title": self.title,
            "charts": [chart.as_json() for chart in self.charts],
            "tables": [asdict(table) for table in self.tables],
            "findings": [asdict(finding) for finding in self.findings],
            "failures": self.failures,
            "notes": self.notes,
            "looks": self.looks,
        }
        write_json(folder / RESULTS, content)


def write_rows(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Writes rows as CSV, whole or not at all; what a row lacks is empty."""
    file.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with written_whole(file) as part, open(part, "w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, columns)
        writer.writeheader()
        writer.writerows(rows)


def read_results(folder: Path) -> Results:
    """The results that a study has written to its folder.

    Raises:
        ValueError: the folder has none, or they are not whole; the message is one line.
    """
    file = folder / RESULTS
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"{file}: of format {content['format']}, expected {FORMAT}")
        return Results(
            content["suite"],
            content["title"],
            charts=[chart_of(each) for each in content["charts"]],
            tables=[
                Table(
                    each["name"],
                    each["title"],
                    tuple(each["columns"]),
                    tuple(map(tuple, each["lines"])),
                    each["note"],
                )
                for each in content["tables"]
            ],
            findings=[Finding(**each) for each in content["findings"]],
            failures=[(what, why) for what, why in content["failures"]],
            notes=content["notes"],
            looks=content["looks"],
        )
    except FileNotFoundError:
        raise ValueError(f"{folder}: it has no {RESULTS}; run the study to its end first") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: it cannot be read ({error})") from None
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file}: it is no file of a study ({error!r})") from None
