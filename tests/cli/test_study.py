"""`pcx study` on a few digits."""

import pytest
from typer.testing import CliRunner

from pcx.cli import app
from pcx.experiments.results import read_results
from pcx.tasks.digits import read_digits

LINE = (
    "study --suite digits --quick --seeds 1 --epochs 1 --tune-epochs 1 --prompts 5 --grid-lr 0.1 "
    "--batch-size 20 --out out"
)


@pytest.fixture(autouse=True)
def few(tmp_path, monkeypatch):
    """A few images of each split of the digits, and an empty working folder."""
    sizes = {"train": 20, "val": 10, "test": 20}
    digits = {s: (x[: sizes[s]], y[: sizes[s]]) for s, (x, y) in read_digits().items()}
    monkeypatch.setattr("pcx.tasks.read_digits", lambda: digits)
    monkeypatch.chdir(tmp_path)


def test_it_runs_writes_and_goes_on(tmp_path):
    done = CliRunner().invoke(app, LINE.split(), catch_exceptions=False)
    said = done.stdout
    assert done.exit_code == 0, said
    assert "1/6: linear on digits, lr 0.1, decay 0.001, clipped to 1, momentum, seed 0: val" in said
    assert "At 10% of the prompts condensing is 2 points above VPT trained with so many." in said
    assert "wrote out/results.csv, results.json and figures" in said
    found = read_results(tmp_path / "out")
    assert not found.failures
    assert {chart.name for chart in found.charts} >= {"accuracy_deep_digits", "kept_per_layer"}
    again = CliRunner().invoke(app, LINE.split(), catch_exceptions=False).stdout
    assert "1/6" not in again
    with pytest.raises(ValueError, match=r"^out: .* epochs 1 \(now 2\)"):
        CliRunner().invoke(app, [*LINE.split(), "--epochs", "2"], catch_exceptions=False)


def test_a_task_that_is_missing_is_named_and_ends_in_an_exit_code(tmp_path):
    done = CliRunner().invoke(
        app, [*LINE.split(), "--task", "digits", "--task", "vtab:dtd"], catch_exceptions=False
    )
    assert done.exit_code == 1
    assert "failed: vtab:dtd: " in done.stdout
    assert read_results(tmp_path / "out").failures[0][0] == "vtab:dtd"
    with pytest.raises(ValueError, match="^--suite: .* Did you mean 'vtab'"):
        CliRunner().invoke(app, ["study", "--suite", "vtabs"], catch_exceptions=False)
    with pytest.raises(ValueError, match="^--task: none can be loaded; vtab:caltech101: "):
        CliRunner().invoke(app, ["study", "--suite", "vtab"], catch_exceptions=False)
