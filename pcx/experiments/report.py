"""A report of one or several runs: one HTML page that needs no network."""

from __future__ import annotations

import base64
import csv
import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pcx import __version__
from pcx.analysis.charts import COLOURS, Chart
from pcx.checkpoints.files import written_whole
from pcx.experiments.ledger import CONFIG, ENVIRONMENT
from pcx.experiments.report_style import ON_DARK, SCRIPT, STYLE
from pcx.experiments.results import ROWS, Finding, Results, Table
from pcx.experiments.run_results import results_in
from pcx.training.run_folder import read_json

ORANGE, GREY, MOST_OPAQUE = (255, 110, 0), (110, 115, 135), 200
_NUMBER = re.compile(r"^[+-]?[\d,.]+(e[+-]?\d+)?( ± [\d.]+)?%?$")


@dataclass
class Run:
    """A run's folder and what is in it.

    Attributes:
        folder: the folder.
        results: charts, tables, findings.
        rows: of results.csv, as text; empty where there is none.
        config, environment: of the files of those names.
    """

    folder: Path
    results: Results
    rows: list[dict[str, str]]
    config: dict[str, Any]
    environment: dict[str, Any]


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[tuple[str, str]]]:
    """The runs in some folders, and which could not be read and why, one line each."""
    runs, failures = list[Run](), list[tuple[str, str]]()
    for folder in folders:
        try:
            runs.append(_read(folder))
        except (ValueError, OSError) as error:
            said = (str(error) or type(error).__name__).splitlines()[0]
            failures.append((str(folder), said.removeprefix(f"{folder}: ")))
    return runs, failures


def _read(folder: Path) -> Run:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    rows: list[dict[str, str]] = []
    if (folder / ROWS).exists():
        with open(folder / ROWS, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    found = [read_json(folder / name) for name in (CONFIG, ENVIRONMENT)]
    return Run(folder, results_in(folder), rows, *found)


def write_report(runs: Sequence[Run], failures: Sequence[tuple[str, str]], file: Path) -> None:
    """Writes the page; nothing of it is loaded from elsewhere.

    Raises:
        ValueError: there is no run.
    """
    if not runs:
        said = "; ".join(f"{what}: {why}" for what, why in failures) or "got none"
        raise ValueError(f"runs: none can be read; {said}")
    with written_whole(file) as part:
        part.write_text(_page(runs, failures), encoding="utf-8")


def _page(runs: Sequence[Run], failures: Sequence[tuple[str, str]]) -> str:
    title = runs[0].results.title if len(runs) == 1 else f"{len(runs)} runs of pcx"
    light = "".join(f"--c{i}: {colour}; " for i, colour in enumerate(COLOURS))
    dark = "".join(f"--c{i}: {colour}; " for i, colour in enumerate(ON_DARK))
    body = [f"<h1>{_text(title)}</h1>", _links(runs)]
    if failures:
        lines = (f"<li>{_text(what)}: {_text(why)}</li>" for what, why in failures)
        body.append(f"<h2>What could not be read</h2><ul>{''.join(lines)}</ul>")
    body += [_section(run, f"r{i}", alone=len(runs) == 1) for i, run in enumerate(runs)]
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{_text(title)}</title>'
        f"<style>{STYLE.replace('LIGHT', light).replace('DARK', dark)}</style></head>\n"
        f"<body><main>{''.join(body)}</main>"
        f'<footer class="soft"><p>Written by pcx {_text(__version__)}.</p></footer>'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _text(value: Any) -> str:
    return html.escape(str(value))


def _links(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return ""
    items = (
        f'<li><a href="#r{i}">{_text(run.results.title)} ({_text(run.folder.name)})</a></li>'
        for i, run in enumerate(runs)
    )
    return f'<nav aria-label="Runs"><ul>{"".join(items)}</ul></nav>'


def _section(run: Run, place: str, *, alone: bool) -> str:
    results = run.results
    parts = [] if alone else [f"<h2>{_text(results.title)}</h2>"]
    parts.append("<ul>" + "".join(f"<li>{_text(note)}</li>" for note in results.notes) + "</ul>")
    if results.failures:
        lines = "".join(f"<li>{_text(w)}: {_text(why)}</li>" for w, why in results.failures)
        parts.append(f"<h3>What failed</h3><ul>{lines}</ul>")
    if results.findings:
        parts.append(f"<h3>Findings</h3>{_findings(results.findings)}")
    if results.charts:
        drawn = "".join(_figure(chart, f"{place}-{i}") for i, chart in enumerate(results.charts))
        parts.append(f'<h3>Figures</h3><div class="charts">{drawn}</div>')
    for table in results.tables:
        parts.append(f"<h3>{_text(table.title)}</h3>{_table(table)}")
    parts += [_gallery(look) for look in results.looks]
    if run.rows:
        values = tuple(tuple(_short(v) for v in row.values()) for row in run.rows)
        whole = _table(Table("rows", "All results", tuple(run.rows[0]), values))
        parts.append(f"<details><summary>All {len(values)} results</summary>{whole}</details>")
    parts.append(f"<h3>Settings and machine</h3>{_settings(run)}")
    return f'<section id="{place}">{"".join(parts)}</section>'


def _short(value: str) -> str:
    """Numbers of many digits to four places."""
    return f"{float(value):.4g}" if re.fullmatch(r"-?\d+\.\d{4,}", value) else value


def _findings(findings: Sequence[Finding]) -> str:
    columns = ("verdict", "finding", "value", "± 95%", "at least")
    lines = []
    for each in findings:
        half = "" if each.half is None else f"{each.half:.2f}"
        value = f"{each.value:+.2f} {each.unit}"
        lines.append((each.verdict(), each.says, value, half, f"{each.least:g}"))
    return _table(Table("findings", "Findings", columns, tuple(lines)), marked=True)


def _table(table: Table, *, marked: bool = False) -> str:
    """A table whose columns are sorted by their heads; it scrolls by itself where it is wide."""
    heads = "".join(
        f'<th scope="col"><button type="button">{_text(name)}</button></th>'
        for name in table.columns
    )
    rows = []
    for line in table.lines:
        cells = []
        for i, value in enumerate(line):
            kind = "number" if _NUMBER.match(str(value)) else ""
            if marked and i == 0:
                kind = "good" if str(value).startswith("holds") else "bad"
            if marked and i == 1:
                kind = "text"
            name = f' class="{kind}"' if kind else ""
            cells.append(f"<td{name}>{_text('' if value is None else value)}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    note = f'<p class="soft">{_text(table.note)}</p>' if table.note else ""
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{_text(table.title)}">'
        f'<table class="sortable"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{note}"
    )


def _figure(chart: Chart, place: str) -> str:
    told, rows = chart.told(), chart.rows()
    svg = chart.svg()
    for number, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--c{number})")
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{place}-\1"', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{place}-", svg)
    svg = svg.replace("<svg", f'<svg fill="currentColor" role="img" aria-label="{_text(told)}"', 1)
    picture = io.BytesIO()
    chart.save(picture, "png")
    files = (("png", "image/png", picture.getvalue()), ("csv", "text/csv", chart.csv().encode()))
    links = " ".join(
        f'<a download="{_text(chart.name)}.{suffix}" href="data:{kind};base64,{_base64(content)}">'
        f"{suffix.upper()}</a>"
        for suffix, kind, content in files
    )
    numbers = Table(chart.name, chart.title, tuple(rows[0]), tuple(map(tuple, rows[1:])))
    note = f'<p class="soft">{_text(chart.note)}</p>' if chart.note else ""
    return (
        f"<figure>{svg}<figcaption>{_text(chart.title)}</figcaption>{note}"
        f'<p class="soft">Download: {links}</p>'
        f"<details><summary>The numbers of {_text(chart.title)}</summary>{_table(numbers)}"
        "</details></figure>"
    )


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _gallery(look: Mapping[str, Any]) -> str:
    """What a model attends to: each image, and the maps over it."""
    parts = [
        f"<h3>What it looks at: {_text(look['task'])}</h3>",
        f'<p class="soft">{_text(look["kept"])}. Orange is much, each map by its own '
        "highest value; grey is dropped. What a prompt attends to is computed in the published "
        "form, and a VPT-Deep drops it; the patches that read a prompt are what the logits depend "
        "on.</p>",
    ]
    for number, image in enumerate(look["images"], 1):
        said = f"image {number}, class {image['label']}, predicted {image['predicted']}"
        maps = [_map(image["picture"], None, f"The image: {said}", said)]
        maps.append(_map(image["picture"], image["cls"], f"Where [CLS] looks, {said}", "[CLS]"))
        for step in image["pruned"]:
            count = sum(map(sum, step["kept"]))
            shown = [[255 * value for value in row] for row in step["kept"]]
            left = f"layer {step['layer']}: {count} left"
            told = f"The patches that Zero-TPrune leaves after {left}, {said}"
            maps.append(_map(image["picture"], shown, told, left, dropped=True))
        prompts = []
        for prompt in image["prompts"]:
            name = f"layer {prompt['layer']}, prompt {prompt['index']}"
            share = f"{100 * prompt['share_read']:.2g}%"
            for key, verb in (("attends", "attends to"), ("read", f"is read by, {share}")):
                told = f"What the prompt ({name}) {verb}, {said}"
                prompts.append(_map(image["picture"], prompt[key], told, f"{name} {verb}"))
        parts.append(
            f"<h4>Image {number}</h4><ul class='maps'>{''.join(maps)}</ul><details><summary>"
            f"Prompt by prompt, image {number}</summary><ul class='maps'>{''.join(prompts)}</ul>"
            "</details>"
        )
    return "".join(parts)


def _map(
    picture: str,
    values: Sequence[Sequence[int]] | None,
    told: str,
    caption: str,
    *,
    dropped: bool = False,
) -> str:
    """An image, and over it a map: what is much is orange, or what is dropped is grey."""
    over = ""
    if values is not None:
        share = np.asarray(values) / 255
        shade = np.zeros((*share.shape, 4), np.uint8)
        shade[..., :3], opaque = (GREY, 1 - share) if dropped else (ORANGE, share)
        shade[..., 3] = np.round(MOST_OPAQUE * opaque)
        file = io.BytesIO()
        Image.fromarray(shade).save(file, "PNG", optimize=True)
        over = f'<img alt="" src="data:image/png;base64,{_base64(file.getvalue())}">'
    image = f'<img alt="{_text(told)}" src="data:image/png;base64,{picture}">'
    return f'<li><div class="map">{image}{over}</div>{_text(caption)}</li>'


def _settings(run: Run) -> str:
    lines = {**run.config, **{k: v for k, v in run.environment.items() if k != "resumed"}}
    return "<dl>" + "".join(_lines(lines)) + "</dl>"


def _lines(content: Mapping[str, Any]) -> Iterable[str]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        if isinstance(value, list):
            value = " ".join(map(str, value))
        yield f"<dt>{_text(str(name).replace('_', ' '))}</dt><dd>{_text(value)}</dd>"
