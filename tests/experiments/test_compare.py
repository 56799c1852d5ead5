"""Averages and tests over tasks, and a comparison as a whole."""

import contextlib
import csv
import statistics
import warnings
from types import SimpleNamespace

import pytest
import scipy.stats
from tiny_tasks import tiny_backbone, tiny_task

from pcx.analysis import figures
from pcx.experiments import averages
from pcx.experiments.compare import Comparison, Row, compare
from pcx.experiments.grids import Cell, Changes
from pcx.experiments.reports import csv_row, markdown, overview, remarks, write_reports
from pcx.experiments.trials import Recipe
from pcx.tasks.listed import ALIASES, VTAB_CLASSES

CELL = Cell(0.1, 0.0, None, "momentum")


def rows_of(method, accuracies, **more):
    """Rows of a method; accuracies of each seed by task."""
    facts = {"val_accuracy": 50.0, "cells": 4, "diverged": 1, "parameters": 10, "edge": ""}
    facts |= {"head_parameters": 5, "ms_per_step": 2.0, "peak_mib": None, **more}
    return [Row(task, method, CELL, accuracies=seeds, **facts) for task, seeds in accuracies]


SETTINGS = {"backbone": "b", "epochs": 1, "batch_size": 4, "amp": "no", "head_init": "keep",
            "device": "cpu"}  # fmt: skip
A = [("vtab:dtd", (60.0, 62.0)), ("vtab:svhn", (80.0, 78.0)), ("vtab:eurosat", (90.0, 92.0)),
     ("vtab:kitti", (40.0, 50.0))]  # fmt: skip
B = [(task, (seeds[0] - 1, seeds[1] - 1 - i)) for i, (task, seeds) in enumerate(A)]


@pytest.fixture
def found():
    tasks = tuple(task for task, _ in A)
    return Comparison(tasks, ("a", "b"), (*rows_of("a", A), *rows_of("b", B)), SETTINGS)


class TestAverages:
    def test_the_groups_are_vtabs(self):
        sizes = {group: len(names) for group, names in averages.VTAB_GROUPS.items()}
        assert sizes == {"natural": 7, "specialized": 4, "structured": 8}
        assert {n for names in averages.VTAB_GROUPS.values() for n in names} == set(VTAB_CLASSES)
        for alias, name in ALIASES.items():
            assert averages.group_of(f"vtab:{alias}") == averages.group_of(f"vtab:{name}")
        assert averages.groups_of(["digits", "sprites:ori", "fgvc:cub", "sprites:loc"]) == {
            "digits": ["digits"],
            "sprites": ["sprites:ori", "sprites:loc"],
            "fgvc": ["fgvc:cub"],
        }

    def test_both_averages_by_hand(self):
        values = {"vtab:dtd": 60.0, "vtab:svhn": 80.0, "vtab:eurosat": 90.0, "vtab:kitti": 40.0}
        assert averages.mean_of_tasks(values) == 67.5
        assert averages.mean_of_groups(values) == pytest.approx((70 + 90 + 40) / 3)

    def test_their_intervals_are_of_each_seeds_own_average(self, found):
        mean, half = found.average("a", averages.mean_of_groups)
        seeds = [(70 + 90 + 40) / 3, (70 + 92 + 50) / 3]
        assert mean == pytest.approx(statistics.fmean(seeds))
        assert half == pytest.approx(12.7062 * statistics.stdev(seeds) / 2**0.5, rel=1e-5)
        assert found.average("a", averages.mean_of_tasks)[0] == pytest.approx((67.5 + 70.5) / 2)

    def test_the_interval_is_students(self):
        values = [1.0, 2.0, 4.0]
        low, high = scipy.stats.t.interval(
            0.95, 2, loc=statistics.fmean(values), scale=scipy.stats.sem(values)
        )
        assert averages.interval(values) == pytest.approx((high - low) / 2)
        assert averages.interval([1.0]) is None


class TestWilcoxon:
    def test_it_is_scipys_one_tailed_test(self):
        better = [78.5, 60.0, 71.25, 90.0, 55.0, 43.0, 66.0]
        worse = [77.0, 60.5, 69.0, 87.0, 51.0, 38.0, 60.0]
        expected = scipy.stats.wilcoxon(better, worse, alternative="greater").pvalue
        assert averages.wilcoxon(better, worse) == expected
        assert averages.wilcoxon(better, worse) == pytest.approx(2 / 2**7)  # one rank of 1 lost
        assert averages.wilcoxon(worse, better) > 0.9

    def test_nineteen_wins_are_as_unlikely_as_can_be(self):
        assert averages.wilcoxon(range(1, 20), [0] * 19) == pytest.approx(2**-19)

    def test_equal_methods_and_ties_give_a_number_and_no_warning(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert averages.wilcoxon([1.0, 2.0], [1.0, 2.0]) == 1
            assert 0 < averages.wilcoxon([1.0, 2.0, 3.0], [1.0, 1.0, 2.0]) < 1


class TestReports:
    def test_the_table_has_both_averages_and_both_counts(self, found):
        columns, lines = overview(found)
        first = dict(zip(columns, lines[0], strict=True))
        assert first["vtab:dtd"].startswith("61.00 ± 12.71")
        assert first["mean of groups"].startswith("68.67 ±")
        assert first["mean of tasks"].startswith("69.00 ±")
        assert (first["parameters"], first["with head"]) == ("10", "15")
        assert (first["ms/step"], first["peak MiB"]) == ("2.0", "-")

    def test_the_report_says_what_was_chosen_tested_and_not_known(self, found):
        text = markdown(found)
        assert "| a | 70.00 | 91.00 | 45.00 | 68.67 | 69.00 |" in text
        assert "lr 0.1, decay 0, not clipped, momentum | - | 50.00 | 4 | 1 | 60.00 62.00 |" in text
        assert f"| a | - | {found.p_value('a', 'b'):.2g} |" in text
        assert found.p_value("a", "b") == 0.0625
        assert "With fewer than 5 tasks no p is under 0.05." in text
        assert "a CPU has no such figure" in text

    def test_rates_at_the_edge_of_a_grid_are_named(self, found):
        assert not any("edge" in said for said in remarks(found))
        (row,) = rows_of("a", A[:1], edge="highest")
        (said,) = remarks(Comparison(("vtab:dtd",), ("a",), (row,), SETTINGS))[1:]
        assert said.endswith("at the grid's edge: a on vtab:dtd (highest).")

    def test_the_rows_of_the_csv(self):
        (row,) = rows_of("a", [("vtab:kitti", (40.0,))], peak_mib=3.0)
        assert csv_row(row) == {
            "task": "vtab:kitti", "group": "structured", "method": "a", "lr": 0.1,
            "weight_decay": 0.0, "clip_grad": None, "opt": "momentum", "cells": 4,
            "diverged_cells": 1, "edge": "", "val_accuracy": 50.0, "accuracies": "40.000",
            "mean": 40.0, "interval_95": None, "parameters": 10, "parameters_with_head": 15,
            "ms_per_step": 2.0, "peak_mib": 3.0,
        }  # fmt: skip

    def test_the_figure_takes_a_method_without_parameters(self, tmp_path):
        points = {"linear": (0, 50.0, 1.0), "full": (1e6, 70.0, None)}
        figures.accuracy_by_parameters(points).write_picture(tmp_path / "f.png")
        figures.accuracy_by_parameters({"linear": (0, 50.0, 1.0)}).write_picture(tmp_path / "g.png")
        assert (tmp_path / "f.png").stat().st_size > 1000


def test_a_comparison_goes_on_where_it_ended(tmp_path, trained):
    tasks = {name: tiny_task(name, seed=seed) for name, seed in (("tiny:a", 0), ("tiny:b", 5))}

    def run(methods, seeds=2, epochs=1):
        changes = Changes([0.01, 0.1], [0.0], [None])
        recipe = Recipe(epochs=epochs, batch_size=6)
        return compare(tasks, methods, tiny_backbone, tmp_path / "out", recipe=recipe,
                       seeds=seeds, changes=changes, say=lambda line: None)  # fmt: skip

    found = run(["linear", "vpt:num_prompts=2"])
    assert len(trained) == 2 * 2 * (2 + 2)
    assert run(["linear", "vpt:num_prompts=2"]) == found
    assert len(trained) == 16
    further = run(["vpt:num_prompts=2", "bias"], seeds=3)  # of bias all, of vpt one seed more
    assert len(trained) == 16 + 2 * 1 + 2 * (2 + 3)
    assert further.row("tiny:b", "vpt:num_prompts=2").accuracies[:2] == (
        found.row("tiny:b", "vpt:num_prompts=2").accuracies
    )
    with pytest.raises(ValueError, match=r"out: .* epochs 1 \(now 2\)"):
        run(["linear"], epochs=2)
    with pytest.raises(ValueError, match="methods: got none"):
        run([])
    write_reports(found, tmp_path / "out")
    with open(tmp_path / "out" / "compare.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(r["task"], r["method"]) for r in rows] == [
        (t, m) for t in tasks for m in ("linear", "vpt:num_prompts=2")
    ]
    assert {r["peak_mib"] for r in rows} == {""}
    for name in ("config.json", "environment.json", "work.log", "compare.md", "compare.png"):
        assert (tmp_path / "out" / name).stat().st_size


def test_a_comparison_in_several_processes_is_refused(tmp_path, monkeypatch):
    two = contextlib.nullcontext(SimpleNamespace(num_processes=2))
    monkeypatch.setattr("pcx.experiments.study.accelerator_for", lambda: two)
    with pytest.raises(ValueError, match=r"^processes: a comparison was launched in 2 processes"):
        compare({}, [], None, tmp_path)
    assert not any(tmp_path.iterdir())
