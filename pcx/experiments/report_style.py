"""The look of a report: its style sheet and its script."""

from __future__ import annotations

# Colours of charts' lines on a dark page, in the order of `pcx.analysis.charts.COLOURS`.
ON_DARK = ("#5ab4e6", "#f08a4b", "#3fc7a0", "#d69bc4", "#d9b640", "#84c5e0", "#b0b0b0", "#ff8a8a")

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1b1b1f; --soft: #55555c;
  --line: #c9c9d0; --raised: #f4f4f7; --link: #0b57d0; --good: #0a6b3d; --bad: #a3000f; LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --page: #14161a; --ink: #ececf0; --soft: #b4b4bd; --line: #45464f; --raised: #1f2229;
    --link: #8ab4f8; --good: #6fd6a0; --bad: #ff9a9a; DARK } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; } h2 { font-size: 1.35rem; margin-top: 2.5rem; }
h3 { font-size: 1.1rem; margin-top: 2rem; }
a { color: var(--link); } p, li, figcaption { max-width: 46rem; }
nav ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; }
.soft { color: var(--soft); font-size: .9rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr));
  gap: 1.5rem; }
figure { margin: 0; min-width: 0; }
figure > svg { width: 100%; height: auto; display: block; }
figcaption { font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: left;
  white-space: nowrap; }
td.number { text-align: right; } td.text { white-space: normal; min-width: 14rem; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible, .wide:focus-visible { outline: 2px solid var(--link); }
th button::after { content: " \\2195"; color: var(--soft); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
details { margin: .4rem 0; } summary { cursor: pointer; }
.maps { display: flex; flex-wrap: wrap; gap: .75rem; padding: 0; list-style: none; }
.maps li { width: 7rem; font-size: .8rem; }
.map { position: relative; width: 7rem; height: 7rem; background: #000; }
.map img { position: absolute; inset: 0; width: 100%; height: 100%; image-rendering: pixelated; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dt { color: var(--soft); } dd { margin: 0; min-width: 0; }
@media (max-width: 30rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; } }
"""

SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(each => each.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = row => row.cells[column].textContent.trim();
    const number = text => parseFloat(text.replace(/,/g, ""));
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)], [p, q] = [number(x), number(y)];
      const order = isNaN(p) || isNaN(q) ? x.localeCompare(y) : p - q;
      return down ? -order : order;
    });
    table.tBodies[0].append(...rows);
  }));
}
"""
