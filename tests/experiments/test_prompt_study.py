"""The study of prompts: its numbers are those of pcx's own functions, and what fails is named."""

import csv
import dataclasses
import json
import statistics

import pytest
import scipy.stats
import timm
import torch
from tiny_study import TINY, asked
from tiny_tasks import made_up, tiny_backbone, tiny_task

import pcx
from pcx.analysis.charts import Lines, chart_of
from pcx.experiments.grids import Grid
from pcx.experiments.ledger import Ledger, read_config
from pcx.experiments.results import Finding, read_results
from pcx.experiments.suites import SUITES


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    found = TINY.run(asked(folder))
    found.write(folder)
    return folder, found


def test_every_case_is_there_once(done):
    rows = done[1].rows
    assert len(rows) == 2 * 2 * (
        1 + 3 + 2  # linear; deep at three shares, shallow at two
        + 2 * 2 * 2  # taylor at each keep and scope, tuned or not
        + (6 * 2) + 2  # six other scores, and [CLS] within layers
        + 1 + 2  # other epochs; shallow
    )  # fmt: skip
    keys = [tuple(str(row[k]) for k in list(row)[:8]) for row in rows]
    assert len(set(keys)) == len(keys)


def test_a_condensed_model_is_what_condense_gives(done):
    folder, found = done
    row = next(
        r for r in found.rows
        if (r["task"], r["seed"], r["score"], r["tuned_epochs"]) == ("tiny:b", 1, "magnitude", 0)
    )  # fmt: skip
    whole = next(
        r for r in found.rows
        if (r["task"], r["seed"], r["method"], r["kind"], r["share"])
        == ("tiny:b", 1, "vpt", "deep", 1.0)
    )  # fmt: skip
    task = tiny_task("tiny:b")
    test = task.loader("test", 6)
    models = [pcx.load(file, tiny_backbone(3)) for file in (folder / "models").iterdir()]
    model = next(
        m
        for m in models
        if m.counts == (4, 4) and pcx.evaluate(m, test)["loss"] == pytest.approx(whole["loss"])
    )
    small = pcx.condense(model, task.loader("trainval", 6), 0.25, method="magnitude", epochs=0,
                         progress=False)  # fmt: skip
    assert row["counts"] == " ".join(map(str, small.counts))
    assert row["loss"] == pytest.approx(pcx.evaluate(small, test)["loss"], rel=1e-5)


def test_averages_and_findings_are_of_the_rows(done):
    _, found = done

    def accuracy(seed, **where):
        rows = [r for r in found.rows if r["seed"] == seed
                and all(r[k] == v for k, v in where.items())]  # fmt: skip
        assert len(rows) == 2
        return statistics.fmean(r["accuracy"] for r in rows)

    one = {"method": "condensed", "kind": "deep", "share": 0.25, "score": "taylor",
           "scope": "global", "tuned_epochs": 1}  # fmt: skip
    few = {"method": "vpt", "kind": "deep", "share": 0.25}
    differences = [accuracy(seed, **one) - accuracy(seed, **few) for seed in (0, 1)]
    finding = next(f for f in found.findings if f.says.startswith("At 25% of the prompts cond"))
    assert finding.value == pytest.approx(statistics.fmean(differences))
    chart = next(c for c in found.charts if c.name == "accuracy_deep")
    tuned = next(s for s in chart.series if s.label == "condensed, fine-tuned")
    assert [x for x, *_ in tuned.points] == [25.0, 50.0]
    assert tuned.points[0][1] == pytest.approx(
        statistics.fmean(accuracy(seed, **one) for seed in (0, 1))
    )


def test_rank_correlations_are_of_the_scores(done):
    folder, found = done
    ledger = Ledger(folder, read_config(folder), "cpu")
    kept = [(json.loads(k), r) for k, r in ledger._results.items()]
    scores = {}
    for work, result in kept:
        if work.get("kind") == "scores" and work["trial"]["method"] == "vpt:num_prompts=4":
            for name, rows in result.items():
                flat = [value for row in rows for value in row]
                scores[work["trial"]["task"], work["trial"]["seed"], name] = flat
    expected = statistics.fmean(
        scipy.stats.spearmanr(scores[t, s, "gate"], scores[t, s, "exact"]).statistic
        for t in ("tiny:a", "tiny:b")
        for s in (0, 1)
    )
    table = next(t for t in found.tables if t.name == "scores")
    line = next(line for line in table.lines if line[0] == "gate")
    assert line[1].startswith(f"{expected:.3f}")


def test_what_is_written_is_read_again(done):
    folder, found = done
    again = read_results(folder)
    assert (again.findings, again.tables, again.notes) == (
        found.findings,
        found.tables,
        found.notes,
    )
    for one, other in zip(again.charts, found.charts, strict=True):
        assert (one.csv(), one.told()) == (other.csv(), other.told())
        assert (folder / "figures" / f"{one.name}.png").stat().st_size > 1000
        assert (folder / "figures" / f"{one.name}.csv").read_text() == one.csv()
    with open(folder / "results.csv") as file:
        assert len(list(csv.DictReader(file))) == len(found.rows)


def test_a_second_run_does_nothing_and_a_further_seed_its_own(done, monkeypatch):
    folder, found = done
    said = []
    assert TINY.run(asked(folder, say=said.append)).rows == found.rows
    assert not said
    more = TINY.run(asked(folder, say=said.append, seeds=3)).rows
    assert [r for r in more if r["seed"] < 2] == found.rows
    assert all("seed 2" in line for line in said)


def test_a_model_whose_file_is_gone_is_trained_again(done, tmp_path):
    folder, found = done
    for file in (folder / "models").iterdir():
        file.unlink()
    plan = {"keeps": (0.25, 0.5, 0.75)}
    more = TINY.run(asked(folder, plan=plan)).rows
    assert [r for r in more if r["share"] != 0.75] == found.rows


class TestFailures:
    def test_a_task_that_is_not_there_is_named_and_the_rest_goes_on(self, tmp_path):
        def load(name):
            if name == "tiny:b":
                raise FileNotFoundError("/data/b: no such folder\nmore")
            return tiny_task(name)

        found = TINY.run(asked(tmp_path, load=load, quick=True, seeds=1))
        assert found.failures == [("tiny:b", "/data/b: no such folder")]
        assert {row["task"] for row in found.rows} == {"tiny:a"}
        with pytest.raises(ValueError, match="^task: none can be loaded; tiny:b: /data/b"):
            TINY.run(asked(tmp_path, load=load, tasks=("tiny:b",)))

    @pytest.mark.parametrize("processes", [1, 2])
    def test_work_that_fails_takes_its_task_out(self, tmp_path, processes):
        def load(name):
            task = tiny_task(name)
            if name == "tiny:a":
                task.splits["test"] = made_up(0, 6)
                task.splits["test"].tensors[0][3] = float("nan")
            return task

        found = TINY.run(asked(tmp_path, load=load, quick=True, seeds=1, processes=processes))
        ((task, why),) = found.failures
        assert task == "tiny:a"
        assert "NaN or infinite" in why
        assert "\n" not in why
        assert {row["task"] for row in found.rows} == {"tiny:b"}

    def test_all_rates_that_diverge_are_named(self, tmp_path):
        plan = {"grid": Grid((1e30,), (0.0,), (None,))}
        found = TINY.run(asked(tmp_path, quick=True, tasks=("tiny:a",), plan=plan))
        assert not found.rows
        assert "diverged" in found.failures[0][1]
        found.write(tmp_path)
        assert read_results(tmp_path).failures == found.failures

    def test_results_that_are_none_are_one_line(self, tmp_path):
        with pytest.raises(ValueError, match="it has no results.json"):
            read_results(tmp_path)
        for content, said in (
            ("{", "cannot be read"),
            ("[]", "no file of a study"),
            ('{"format": 7}', "of format 7"),
            ('{"format": 1, "suite": "x"}', "no file of a study"),
        ):
            (tmp_path / "results.json").write_text(content)
            with pytest.raises(ValueError, match=said) as caught:
                read_results(tmp_path)
            assert "\n" not in str(caught.value)


def test_backbones_without_a_class_token_have_no_score_by_it(tmp_path):
    def backbone(classes):
        torch.manual_seed(0)
        small = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16}
        name = "swin_tiny_patch4_window7_224"
        return timm.create_model(
            name, **small, depths=(1, 1), num_heads=(2, 2), num_classes=classes
        ).eval()

    request = dataclasses.replace(
        asked(tmp_path, quick=True, seeds=1, tasks=("tiny:a",)), new_backbone=backbone
    )
    found = TINY.run(request)
    assert not found.failures
    assert {r["score"] for r in found.rows} == {
        "", "taylor", "taylor-inner", "gate", "magnitude", "random", "exact",
    }  # fmt: skip


def test_a_verdict_says_whether_it_is_within_chance():
    assert Finding("", 1.0, 0.5, 0.2).verdict() == "holds"
    assert Finding("", 1.0, 0.5, 2.0).verdict() == "holds, within chance"
    assert Finding("", 0.1, 0.5, 2.0).verdict() == "fails, within chance"
    assert Finding("", 0.1, 0.5).verdict() == "fails"


def test_suites_are_listed_and_charts_are_checked():
    for name in SUITES:
        assert SUITES[name].name == name
    for wrong in ({}, {"kind": "pie"}, {"kind": "lines", "pie": 1}):
        with pytest.raises(ValueError, match="^chart: not one of"):
            chart_of(wrong)
    assert chart_of(Lines("a", "b").as_json()) == Lines("a", "b")


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"prompts": 0}, "prompts: 0"),
        ({"keeps": (0.0,)}, "keeps: 0"),
        ({"keeps": (0.1, 0.5)}, "prompts: 4, of which 10% in each layer are none; give 5 or more"),
        ({"scores": ("tailor",)}, "Did you mean 'taylor'"),
        ({"depth": 3}, "plan: got"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(tmp_path, plan, message):
    with pytest.raises(ValueError, match=message):
        TINY.run(asked(tmp_path, plan=plan))
    assert not any(tmp_path.iterdir())
