"""`pcx compare`, and `pcx train --method` with arguments, on a tiny procedural task."""

import pytest
from typer.testing import CliRunner

import pcx
from pcx.cli import app
from pcx.tasks.digits import read_digits


@pytest.fixture
def few(tmp_path, monkeypatch):
    """A few images of each split of the digits, and an empty working folder."""
    sizes = {"train": 40, "val": 20, "test": 30}
    digits = {s: (x[: sizes[s]], y[: sizes[s]]) for s, (x, y) in read_digits().items()}
    monkeypatch.setattr("pcx.tasks.read_digits", lambda: digits)
    monkeypatch.chdir(tmp_path)


def said_by(line):
    done = CliRunner().invoke(app, line.split(), catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


@pytest.mark.usefixtures("few")
def test_it_compares_writes_and_goes_on(tmp_path):
    line = (
        "compare --task digits --methods linear --method vpt:num_prompts=2,kind=shallow --epochs 1 "
        "--seeds 2 --grid-lr 0.1,0.3 --grid-weight-decay 0 --grid-clip-grad 1 --batch-size 20 "
        "--out out"
    )
    said = said_by(line)
    assert "4/4: vpt:num_prompts=2,kind=shallow on digits, lr 0.3, decay 0, clipped to 1" in said
    assert "a CPU has no such figure" in said
    table = [row for row in said.splitlines() if "vpt:num_prompts=2,kind=shallow │" in row]
    assert "│        192 │     1,162 │" in table[0]  # 2 x 96; a head of 970
    assert "wrote out/compare.csv, compare.md and compare.png" in said
    again = said_by(line)
    assert "4/4" not in again
    assert table[0] in again
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "compare.csv",
        "compare.md",
        "compare.png",
        "config.json",
        "environment.json",
        "work.log",
    }


@pytest.mark.usefixtures("few")
def test_train_takes_methods_with_arguments():
    run = "train --task digits --epochs 1 --lr 0.01 --batch-size 20"
    said_by(f"{run} --out s.safetensors --method sct:k=5,layers=0+3")
    said_by(f"{run} --out v.safetensors --method vpt:num_prompts=3,kind=shallow --dropout 0.1")
    sct, vpt = pcx.load("s.safetensors"), pcx.load("v.safetensors")
    assert (sct.k, sct.layers) == ((5, 5), (0, 3))
    assert (vpt.counts, vpt.dropout) == ((3, 0, 0, 0, 0, 0), 0.1)


def test_methods_without_a_rate_name_what_finds_one():
    line = ["train", "--task", "digits", "--method", "sct"]
    with pytest.raises(ValueError, match=r"give --lr or --base-lr; --method sct .* pcx compare"):
        CliRunner().invoke(app, line, catch_exceptions=False)
