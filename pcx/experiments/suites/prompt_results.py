"""Charts, tables and findings of a study of prompts, by the numbers of the papers' figures."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from pcx.analysis.charts import Bars, HeatMap, Lines, Series
from pcx.condensation.selection import select
from pcx.experiments.results import Finding, Results, Table
from pcx.experiments.suites.gathered import Average, Gathered, mean_of

SHARE, ACCURACY, INTERVAL = "prompts, % of all", "test accuracy, %", "± is half a 95% t-interval"
FIRST, EXACT = "taylor", "exact"
LINEAR = {"method": "linear"}
LABELS = {
    "trained": "VPT trained with so many",
    "tuned": "condensed, fine-tuned",
    "not tuned": "condensed, not fine-tuned",
}


def vpt(share: float = 1.0, kind: str = "deep") -> dict[str, Any]:
    """The rows of VPTs that were trained with a share of the prompts."""
    return {"method": "vpt", "kind": kind, "share": share}


def condensed(
    share: float, epochs: int, score: str = FIRST, scope: str = "global", kind: str = "deep"
) -> dict[str, Any]:
    """The rows of condensed VPTs."""
    named = {"method": "condensed", "kind": kind, "share": share, "score": score}
    return {**named, "scope": scope, "tuned_epochs": epochs}


def written_up(found: Gathered, suite: str, title: str) -> Results:
    """The results for readers."""
    results = Results(suite, title, rows=found.rows, failures=found.failures, looks=found.looks)
    results.notes = _notes(found)
    if not found.tasks:
        return results
    several = len(found.tasks) > 1
    results.charts = [_by_share(found, "deep", None if several else found.tasks[0])]
    results.charts += [_by_share(found, "deep", task) for task in found.tasks if several]
    if found.plan.shallow_keeps:
        results.charts.append(_by_share(found, "shallow", None if several else found.tasks[0]))
    results.charts += [_spectrum(found)] if found.spectra else []
    results.charts += [_without_layers(found), _per_layer(found)]
    results.charts += [_survival(found, task) for task in found.tasks]
    results.charts.append(_by_epochs(found))
    results.tables = [_by_count(found), _selections(found), _scores(found), _stages(found)]
    results.findings = _findings(found)
    return results


def _notes(found: Gathered) -> list[str]:
    s, plan = found.settings, found.plan
    diverged = sum(row["diverged"] for row in found.rows)
    notes = [
        f"{s.get('backbone')}, {s.get('epochs')} epochs, batch {s.get('batch_size')}, amp "
        f"{s.get('amp')}, head {s.get('head_init')}, on {s.get('device')}.",
        f"{plan.prompts} prompts a layer are 100% of VPT-Deep, {plan.shallow} of VPT-Shallow.",
        f"{len(plan.grid.cells(1))} cells of one grid for every method: rates "
        f"{', '.join(f'{lr:g}' for lr in plan.grid.lr)}; norms to clip to "
        f"{', '.join('none' if c is None else f'{c:g}' for c in plan.grid.clip_grad)}. The last "
        "epoch's accuracy on val chooses; the chosen cell is trained anew on train and val, and "
        "tested once, at its last epoch.",
        f"Condensed prompts are fine-tuned for {plan.tune_epochs} epochs at a tenth of the rate. A "
        f"VPT that is trained with fewer prompts trains {plan.tune_epochs} epochs more.",
        f"{len(found.seeds)} seeds; {INTERVAL} over the seeds' means of tasks."
        if len(found.seeds) > 1
        else "One seed, so that there are no intervals.",
    ]
    if diverged:
        notes.append(f"{diverged} fine-tunings diverged; they count as 0%.")
    edges = sorted({f"{r['task']} ({r['edge']})" for r in found.rows if r.get("edge")})
    if edges:
        notes.append(f"Some chosen rates lie at the grid's edge: {', '.join(edges)}.")
    return notes


def _by_share(found: Gathered, kind: str, task: str | None) -> Lines:
    """Accuracy by the share of prompts (Figures 1 and 4; 5 of VPT-Shallow)."""

    def at(where: dict[str, Any]) -> Average:
        return found.average(**where) if task is None else found.of_task(task, **where)

    plan = found.plan
    keeps = plan.keeps if kind == "deep" else plan.shallow_keeps
    lines = {
        LABELS["trained"]: [(k, at(vpt(k, kind))) for k in (*keeps, 1.0)],
        LABELS["tuned"]: [(k, at(condensed(k, plan.tune_epochs, kind=kind))) for k in keeps],
        LABELS["not tuned"]: [(k, at(condensed(k, 0, kind=kind))) for k in keeps],
    }
    series = tuple(
        Series(label, tuple((100 * k, *each) for k, each in points))
        for label, points in lines.items()
    )
    figure = "Figures 1 and 4" if kind == "deep" else "Figure 5"
    of = "mean of tasks" if task is None else task
    return Lines(
        f"accuracy_{kind}" + ("" if task is None else f"_{_file(task)}"),
        f"{figure}: VPT-{kind.capitalize()}, {of}",
        INTERVAL,
        x=SHARE,
        y=ACCURACY,
        series=series,
        levels={"VPT, 100%": at(vpt(1.0, kind)), "linear probe": at(LINEAR)},
    )


def _file(task: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in task)


def _spectrum(found: Gathered) -> Lines:
    """Cumulative eigenvalues of attention matrices, mean of all (Figure 2)."""
    series = []
    for name, label in (("with", "with prompts"), ("without", "without prompts")):
        rows = [each[name] for each in found.spectra.values()]
        points = [(i + 1, statistics.fmean(v), None) for i, v in enumerate(zip(*rows, strict=True))]
        series.append(Series(label, tuple(points), dashed=name == "without"))
    return Lines(
        "eigenvalues",
        "Figure 2: cumulative eigenvalues of attention",
        "Magnitudes, mean over layers, heads' mean attention, images, tasks and seeds.",
        x="number of eigenvalues",
        y="share of their sum",
        series=tuple(series),
    )


def _without_layers(found: Gathered) -> Bars:
    """How much accuracy is lost without a layer's prompts (Figure 3)."""
    layers = len(next(iter(found.without_layers.values()))["without"])
    bars = {}
    for task in found.tasks:
        rows = [found.without_layers[task, seed] for seed in found.seeds]
        lost = [[row["whole"] - row["without"][i] for row in rows] for i in range(layers)]
        bars[task] = tuple((statistics.fmean(v), _sd(v)) for v in lost)
    return Bars(
        "without_layers",
        "Figure 3: accuracy lost without a layer's prompts",
        "Mean and standard deviation over seeds.",
        x="layer",
        y="points of test accuracy lost",
        groups=tuple(str(i + 1) for i in range(layers)),
        bars=bars,
    )


def _sd(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _per_layer(found: Gathered) -> Bars:
    """Prompts kept in each layer (Figure 7)."""
    bars = {}
    for keep in sorted({max(found.plan.keeps), *found.plan.score_keeps}, reverse=True):
        wanted = condensed(keep, 0).items()
        rows = [r for r in found.rows if all(r[name] == value for name, value in wanted)]
        counts = [list(map(int, row["counts"].split())) for row in rows]
        bars[f"{100 * keep:g}%"] = tuple(
            (statistics.fmean(v), _sd(list(map(float, v)))) for v in zip(*counts, strict=True)
        )
    layers = len(next(iter(bars.values())))
    return Bars(
        "kept_per_layer",
        "Figure 7: prompts kept in each layer",
        f"By {FIRST}, global. Mean and standard deviation over tasks and seeds.",
        x="layer",
        y="prompts",
        groups=tuple(str(i + 1) for i in range(layers)),
        bars=bars,
    )


def _survival(found: Gathered, task: str) -> HeatMap:
    """The smallest share at which a prompt is still kept, of the first seed."""
    rows = [torch.tensor(r, dtype=torch.float64) for r in found.scores[task, found.seeds[0]][FIRST]]
    share = [[100.0] * len(row) for row in rows]
    for percent in range(95, 0, -5):
        if percent / 100 * sum(map(len, rows)) < 1:
            break
        for layer, kept in enumerate(select(rows, percent / 100)):
            for i in kept.tolist():
                share[layer][i] = float(percent)
    most = max(map(len, rows))
    return HeatMap(
        f"kept_{_file(task)}",
        f"Which prompts are kept, {task}, seed {found.seeds[0]}",
        f"By {FIRST}, global: the smallest share of all prompts at which each is still kept.",
        x="prompt",
        y="layer",
        columns=tuple(str(i + 1) for i in range(most)),
        lines=tuple(str(i + 1) for i in range(len(rows))),
        values=tuple(tuple(row) + (None,) * (most - len(row)) for row in share),
        unit="kept from so many % on",
    )


def _by_epochs(found: Gathered) -> Lines:
    """Accuracy by the epochs of fine-tuning, at the smallest share (Figure 8a)."""
    plan, keep = found.plan, min(found.plan.keeps)
    epochs = sorted({0, plan.tune_epochs, *plan.other_epochs})
    points = tuple((e, *found.average(**condensed(keep, e))) for e in epochs)
    return Lines(
        "fine_tuning_epochs",
        f"Figure 8a: epochs of fine-tuning at {100 * keep:g}%",
        f"{INTERVAL}. Each is a training of its own.",
        x="epochs of fine-tuning",
        y=ACCURACY,
        series=(Series(LABELS["tuned"], points),),
        levels={"VPT, 100%": found.average(**vpt())},
    )


def said(average: Average) -> str:
    """A mean and its interval in words."""
    mean, half = average
    return f"{mean:.1f}" if half is None else f"{mean:.1f} ± {half:.1f}"


def _by_count(found: Gathered) -> Table:
    """Accuracy of VPTs by their number of prompts (Table 2)."""
    plan = found.plan
    lines: list[tuple[Any, ...]] = []
    cases = [("linear probe", LINEAR)]
    for kind, keeps in (("deep", plan.keeps), ("shallow", plan.shallow_keeps)):
        cases += [(f"VPT-{kind.capitalize()}, {100 * k:g}%", vpt(k, kind)) for k in (*keeps, 1.0)]
    for label, where in cases:
        tasks = [said(found.of_task(task, **where)) for task in found.tasks]
        whole = [said(found.of_groups(**where)), said(found.average(**where))]
        lines.append((label, *tasks, *whole))
    columns = ("method", *found.tasks, "mean of groups", "mean of tasks")
    title = "Table 2: VPT by its number of prompts"
    return Table("vpt_by_count", title, columns, tuple(lines), INTERVAL)


def _selections(found: Gathered) -> Table:
    """Global, local and [CLS] within layers (Table 3)."""
    plan = found.plan
    cases = {
        f"{FIRST}, global": {},
        f"{FIRST}, local": {"scope": "local"},
        "[CLS], local": {"score": "cls-attention", "scope": "local"},
        "random, global": {"score": "random"},
    }
    if "cls-attention" not in plan.scores:
        del cases["[CLS], local"]
    lines = []
    for keep in plan.score_keeps:
        for label, case in cases.items():
            averages = [found.average(**condensed(keep, e, **case)) for e in (plan.tune_epochs, 0)]
            lines.append((f"{100 * keep:g}%", label, *map(said, averages)))
    columns = ("kept", "score and scope", "fine-tuned", "not fine-tuned")
    title = "Table 3: what selects the prompts"
    return Table("selections", title, columns, tuple(lines), f"Mean of tasks. {INTERVAL}")


def _methods(found: Gathered) -> list[str]:
    return [*found.plan.scores, *([EXACT] if found.plan.exact else [])]


def _scores(found: Gathered) -> Table:
    """All scores, and how they rank beside real removal."""
    plan, lines = found.plan, []
    cases = [(keep, epochs) for keep in plan.score_keeps for epochs in (plan.tune_epochs, 0)]
    for score in _methods(found):
        line: list[Any] = [score]
        if plan.exact:
            mean, half = mean_of(found.spearman(score))
            line.append(f"{mean:.3f}" if half is None else f"{mean:.3f} ± {half:.3f}")
        line += [said(found.average(**condensed(*case, score=score))) for case in cases]
        lines.append(tuple(line))
    names = [f"{100 * keep:g}%" + (", fine-tuned" if epochs else "") for keep, epochs in cases]
    columns = ("score", *(["rank correlation with removal"] if plan.exact else []), *names)
    note = f"All prompts ranked together. Mean of tasks. {INTERVAL}"
    return Table("scores", "Scores of prompts", columns, tuple(lines), note)


def _stages(found: Gathered) -> Table:
    """What condensing costs beside training (Figure 8b)."""
    epochs, tuned = found.settings["epochs"], found.plan.tune_epochs
    lines = []
    for task, times in found.times.items():
        train, tune = epochs * times["train_epoch"], tuned * times["tune_epoch"]
        share = 100 * (times["score"] + tune) / train
        lines.append((task, *(f"{v:.1f}" for v in (train, times["score"], tune)), f"{share:.0f}%"))
    columns = ("task", "training, s", "scoring, s", "fine-tuning, s", "condensing of training")
    note = f"{epochs} epochs of training, {tuned} of fine-tuning, by the time of a warm epoch."
    return Table("stage_times", "Figure 8b: time of the stages", columns, tuple(lines), note)


def _findings(found: Gathered) -> list[Finding]:
    """What the papers and pcx say, against this study's numbers."""
    plan = found.plan
    low, some, most = min(plan.keeps), plan.score_keeps[-1], max(plan.keeps)
    tune = plan.tune_epochs

    def finding(says: str, one: dict, other: dict, least: float) -> Finding:
        mean, half = found.difference(one, other)
        return Finding(says, mean, least, half)

    at = {keep: f"{100 * keep:g}% of the prompts" for keep in (low, some, most)}
    findings = [
        finding(f"VPT trained with {at[most]} is within 1 point of VPT.", vpt(most), vpt(), -1.0),
        finding(
            f"Condensed to {at[some]} and fine-tuned, VPT is within 0.5 points of itself.",
            condensed(some, tune), vpt(), -0.5,
        ),
        finding(
            f"At {at[low]} condensing is 2 points above VPT trained with so many.",
            condensed(low, tune), vpt(low), 2.0,
        ),
        finding(
            f"At {at[low]}, fine-tuned, {FIRST} is above random.",
            condensed(low, tune), condensed(low, tune, "random"), 0.0,
        ),
        finding(
            f"At {at[some]}, not fine-tuned, {FIRST} is 10 points above random.",
            condensed(some, 0), condensed(some, 0, "random"), 10.0,
        ),
        finding(
            f"At {at[low]}, not fine-tuned, ranking all layers together is above each by itself.",
            condensed(low, 0), condensed(low, 0, scope="local"), 0.0,
        ),
    ]  # fmt: skip
    if "cls-attention" in plan.scores:
        rival = condensed(low, tune, "cls-attention", "local")
        says = f"At {at[low]}, fine-tuned, {FIRST} is above the attention of [CLS] within layers."
        findings.append(finding(says, condensed(low, tune), rival, 0.0))
    if plan.exact:
        findings += _rank_finding(found)
    return findings


def _rank_finding(found: Gathered) -> list[Finding]:
    rivals = {m: found.spearman(m) for m in found.plan.scores if m != FIRST}
    best = max(rivals, key=lambda m: statistics.fmean(rivals[m]))
    pairs = zip(found.spearman(FIRST), rivals[best], strict=True)
    mean, half = mean_of([a - b for a, b in pairs])
    says = (
        f"Of the scores of one pass {FIRST} ranks prompts most like their real removal (the next "
        f"is {best})."
    )
    return [Finding(says, mean, 0.0, half, "rank correlation")]
