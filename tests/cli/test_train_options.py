"""`pcx train` with class weights, the five likeliest classes, and a tracker."""

import csv
import json

import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from typer.testing import CliRunner

from pcx.cli import app
from pcx.tasks.digits import read_digits


def test_class_weights_top5_and_a_tracker(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.chdir(tmp_path)
    line = "train --task digits --out a.safetensors --epochs 1 --prompts 1 --lr 0.1"
    more = "--class-weights balanced --top5 --track tensorboard"
    done = CliRunner().invoke(app, [*line.split(), *more.split()], catch_exceptions=False)
    assert "% among the five likeliest, loss" in done.stdout
    run = tmp_path / "a.safetensors.ckpt"
    labels = read_digits()["train"][1].numpy()
    expected = compute_class_weight("balanced", classes=torch.arange(10).numpy(), y=labels)
    criterion = json.loads((run / "config.json").read_text())["recipe"]["criterion"]
    weights = [float(part) for part in criterion.split("weights ")[1].split(", ")]
    assert weights == pytest.approx(expected.tolist())
    with open(run / "history.csv") as file:
        (row,) = csv.DictReader(file)
    events = accumulator.EventAccumulator(str(run / "pcx")).Reload()
    for name in ("loss", "accuracy_top5", "val_accuracy_top5"):
        assert events.Scalars(name)[0].value == pytest.approx(float(row[name]), rel=1e-6)
    arguments = ["eval", "a.safetensors", "--task", "digits"]
    near = CliRunner().invoke(app, [*arguments, "--top5"], catch_exceptions=False).stdout
    assert near.strip() in done.stdout
    plain = CliRunner().invoke(app, arguments, catch_exceptions=False).stdout
    assert "likeliest" not in plain


def test_five_of_five_classes_say_nothing(tmp_path, monkeypatch):
    digits = {s: (x[y < 5], y[y < 5]) for s, (x, y) in read_digits().items()}
    monkeypatch.setattr("pcx.tasks.read_digits", lambda: digits)
    monkeypatch.setattr("pcx.tasks.DIGITS_CLASSES", 5)
    monkeypatch.chdir(tmp_path)
    line = "train --task digits --out a.safetensors --epochs 1 --prompts 1 --lr 0.1 --top5"
    with pytest.raises(ValueError, match="--top5: digits has 5 classes, expected 6 or more"):
        CliRunner().invoke(app, line.split(), catch_exceptions=False)
