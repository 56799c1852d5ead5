"""Charts as data: each is drawn, written as a table, and told in words from the same numbers."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pcx.checkpoints.files import written_whole
from pcx.extras import need

# Colours that differ for the colour-blind (Okabe and Ito), dark enough for a white page.
COLOURS = ("#0072b2", "#b34700", "#007a5a", "#9b4f83", "#856500", "#33728f", "#555555", "#a3000f")
MARKERS = "osD^vP*X"
INK, SOFT = "#000000", "#777777"  # of axes and text; of lines that others are compared with
SIZE = (5.0, 3.2)  # inches


@dataclass(frozen=True)
class Series:
    """One line of a chart: points (x, y, half the width of an interval, or None)."""

    label: str
    points: tuple[tuple[float, float, float | None], ...]
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """What all charts have.

    Attributes:
        name: of its files, without a suffix.
        title: in a few words, with the source's number where it has one.
        note: what a reader must know; may be empty.
        x, y: names of the axes.
    """

    kind: ClassVar[str]
    name: str
    title: str
    note: str = ""
    x: str = ""
    y: str = ""

    def as_json(self) -> dict[str, Any]:
        """The chart as JSON, which `chart_of` reads."""
        return {"kind": self.kind, **asdict(self)}

    def rows(self) -> list[list[Any]]:
        """The numbers as a table, its first row the names of the columns."""
        raise NotImplementedError

    def told(self) -> str:
        """What the picture shows, for those who cannot see it."""
        raise NotImplementedError

    def draw(self, axes: Any, figure: Any) -> None:
        """Draws on matplotlib's axes."""
        raise NotImplementedError

    def csv(self) -> str:
        """The rows as CSV."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(self.rows())
        return text.getvalue()

    def svg(self) -> str:
        """The picture as SVG without a size of its own; black is the text's colour around it."""
        text = io.StringIO()
        _saved(self, text, format="svg", metadata={"Date": None, "Creator": None})
        found = text.getvalue()
        found = found[found.index("<svg") :]
        found = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", found, count=1)
        found = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", found, count=1)
        found = re.sub(r"<metadata>.*?</metadata>", "", found, flags=re.DOTALL)
        return found.replace(INK, "currentColor").strip()

    def write(self, folder: Path) -> None:
        """Writes <name>.png and <name>.csv."""
        folder.mkdir(parents=True, exist_ok=True)
        self.write_picture(folder / f"{self.name}.png")
        with written_whole(folder / f"{self.name}.csv") as part:
            part.write_text(self.csv(), encoding="utf-8")

    def write_picture(self, file: Path) -> None:
        """Writes the picture; the name's ending says the format."""
        with written_whole(file) as part:
            self.save(part, file.suffix[1:])

    def save(self, where: Any, form: str) -> None:
        """Writes the picture to a file, open or not, in a format such as "png"."""
        _saved(self, where, format=form, dpi=150)


def _saved(chart: Chart, where: Any, **arguments: Any) -> None:
    need("matplotlib", "a figure")
    import matplotlib
    from matplotlib.figure import Figure

    # The text stays text, and names of elements do not change from run to run.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.name}):
        figure = Figure(figsize=SIZE, layout="constrained", facecolor="none")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_facecolor("none")
        axes.set_xlabel(chart.x)
        axes.set_ylabel(chart.y)
        chart.draw(axes, figure)
        if arguments["format"] != "svg":
            figure.set_facecolor("white")
        figure.savefig(where, **arguments)


@dataclass(frozen=True)
class Lines(Chart):
    """Lines over numbers, with intervals.

    Attributes:
        series: the lines.
        levels: by label, (y, half an interval or None), drawn as dotted horizontal lines.
        log: whether x is logarithmic, from 0 on: "symlog" of matplotlib.
    """

    kind = "lines"
    series: tuple[Series, ...] = ()
    levels: Mapping[str, tuple[float, float | None]] = field(default_factory=dict)
    log: bool = False

    def rows(self) -> list[list[Any]]:
        """A row for each point: label, x, y, half the interval; a level has no x."""
        found: list[list[Any]] = [["series", self.x, self.y, "interval_95"]]
        found += [[s.label, x, y, half] for s in self.series for x, y, half in s.points]
        return found + [[label, None, y, half] for label, (y, half) in self.levels.items()]

    def told(self) -> str:
        """Where each line begins and ends."""
        said = [
            f"{s.label}: {s.points[0][1]:.4g} at {s.points[0][0]:g}, "
            f"{s.points[-1][1]:.4g} at {s.points[-1][0]:g}"
            for s in self.series
            if s.points
        ]
        said += [f"{label}: {y:.4g}" for label, (y, _) in self.levels.items()]
        return f"{self.title}. {self.y} by {self.x}. " + "; ".join(said)

    def draw(self, axes: Any, figure: Any) -> None:
        """Draws on matplotlib's axes."""
        for number, series in enumerate(self.series):
            xs, ys, halves = zip(*series.points, strict=True)
            many = len(xs) > 25
            axes.errorbar(
                xs,
                ys,
                yerr=[half or 0 for half in halves] if any(halves) else None,
                marker=None if many else MARKERS[number % len(MARKERS)],
                markersize=4,
                linestyle="--" if series.dashed else "-" if len(xs) > 1 else "",
                capsize=3,
                color=COLOURS[number % len(COLOURS)],
                label=series.label,
            )
        for (label, (y, half)), style in zip(self.levels.items(), (":", "-.") * 4, strict=False):
            axes.axhline(y, color=SOFT, linestyle=style, label=label)
            if half:
                axes.axhspan(y - half, y + half, color=SOFT, alpha=0.15, linewidth=0)
        if self.log:
            most = max(x for s in self.series for x, *_ in s.points)
            axes.set_xscale("symlog", linthresh=1000)
            axes.set_xticks([0, *(10**k for k in range(3, len(str(round(most))) + 1))])
            axes.set_xlim(left=-200)
        figure.legend(loc="outside right upper", fontsize=7, frameon=False)


@dataclass(frozen=True)
class Bars(Chart):
    """Groups of bars with deviations.

    Attributes:
        groups: names of the places on x.
        bars: by label, for each group (height, deviation or None).
        spread: what the deviations are, such as "sd".
    """

    kind = "bars"
    groups: tuple[str, ...] = ()
    bars: Mapping[str, Sequence[tuple[float, float | None]]] = field(default_factory=dict)
    spread: str = "sd"

    def rows(self) -> list[list[Any]]:
        """A row for each bar: label, group, height, deviation."""
        found: list[list[Any]] = [["bars", self.x, self.y, self.spread]]
        return found + [
            [label, group, *height]
            for label, heights in self.bars.items()
            for group, height in zip(self.groups, heights, strict=True)
        ]

    def told(self) -> str:
        """The lowest and the highest of each colour."""
        said = []
        for label, heights in self.bars.items():
            low = min(range(len(heights)), key=lambda i: heights[i][0])
            high = max(range(len(heights)), key=lambda i: heights[i][0])
            said.append(
                f"{label}: from {heights[low][0]:.4g} ({self.groups[low]}) to "
                f"{heights[high][0]:.4g} ({self.groups[high]})"
            )
        return f"{self.title}. {self.y} by {self.x}. " + "; ".join(said)

    def draw(self, axes: Any, figure: Any) -> None:
        """Draws on matplotlib's axes."""
        width = 0.8 / len(self.bars)
        for number, (label, heights) in enumerate(self.bars.items()):
            places = [i + (number - (len(self.bars) - 1) / 2) * width for i in range(len(heights))]
            spreads = [spread for _, spread in heights]
            axes.bar(
                places,
                [height for height, _ in heights],
                width=width,
                yerr=[spread or 0 for spread in spreads] if any(spreads) else None,
                capsize=2,
                color=COLOURS[number % len(COLOURS)],
                error_kw={"ecolor": SOFT},
                label=label,
            )
        axes.set_xticks(range(len(self.groups)), self.groups, fontsize=8)
        if len(self.bars) > 1:
            figure.legend(loc="outside right upper", fontsize=7, frameon=False)


@dataclass(frozen=True)
class HeatMap(Chart):
    """A table of numbers as colours.

    Attributes:
        columns, lines: names of the columns and of the rows.
        values: by row; None where there is none.
        unit: of the values.
    """

    kind = "heat"
    columns: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()
    values: tuple[tuple[float | None, ...], ...] = ()
    unit: str = ""

    def rows(self) -> list[list[Any]]:
        """The table, with the names of the rows in the first column."""
        rows = zip(self.lines, self.values, strict=True)
        return [[f"{self.y} \\ {self.x}", *self.columns], *([line, *row] for line, row in rows)]

    def told(self) -> str:
        """The range of the values."""
        known = [value for row in self.values for value in row if value is not None]
        return (
            f"{self.title}. {self.unit} by {self.y} and {self.x}, from {min(known):.4g} to "
            f"{max(known):.4g}"
        )

    def draw(self, axes: Any, figure: Any) -> None:
        """Draws on matplotlib's axes."""
        values = [[math.nan if v is None else v for v in row] for row in self.values]
        drawn = axes.imshow(values, aspect="auto", cmap="cividis", interpolation="nearest")
        figure.colorbar(drawn, label=self.unit)
        for ticks, names in ((axes.set_xticks, self.columns), (axes.set_yticks, self.lines)):
            every = max(1, math.ceil(len(names) / 12))
            ticks(range(0, len(names), every), names[::every], fontsize=7)


@dataclass(frozen=True)
class Points(Chart):
    """Points in the order of their values, coloured by a whole number.

    Attributes:
        points: (value, number) from the highest on.
        colour: what the number is.
        cut: the place on x up to which points are kept; None for none.
    """

    kind = "points"
    points: tuple[tuple[float, int], ...] = ()
    colour: str = ""
    cut: float | None = None

    def rows(self) -> list[list[Any]]:
        """A row for each point: place, value, number."""
        found: list[list[Any]] = [[self.x, self.y, self.colour]]
        return found + [[place, *point] for place, point in enumerate(self.points)]

    def told(self) -> str:
        """The range of the values, and where the cut is."""
        cut = "" if self.cut is None else f"; the first {math.ceil(self.cut)} are kept"
        return (
            f"{self.title}. {len(self.points)} points, {self.y} from {self.points[0][0]:.4g} to "
            f"{self.points[-1][0]:.4g}{cut}"
        )

    def draw(self, axes: Any, figure: Any) -> None:
        """Draws on matplotlib's axes."""
        values, numbers = zip(*self.points, strict=True)
        places = range(len(values))
        drawn = axes.scatter(places, values, c=numbers, s=10, cmap="viridis")
        figure.colorbar(drawn, label=self.colour)
        if self.cut is not None:
            axes.axvline(self.cut, color=SOFT, linestyle="--", label="kept")
            axes.legend(frameon=False)
        if min(values) > 0:
            axes.set_yscale("log")


KINDS = {each.kind: each for each in (Lines, Bars, HeatMap, Points)}


def chart_of(content: Mapping[str, Any]) -> Chart:
    """The chart that `Chart.as_json` gave.

    Raises:
        ValueError: it is none.
    """
    try:
        arguments = dict(content)
        cls = KINDS[arguments.pop("kind")]
        if cls is Lines:
            arguments["series"] = tuple(
                Series(s["label"], tuple(map(tuple, s["points"])), s["dashed"])  # type: ignore[arg-type]
                for s in arguments["series"]
            )
        return cls(**arguments)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"chart: not one of {tuple(KINDS)} ({error!r})") from None
