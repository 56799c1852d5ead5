"""Trackers: what TensorBoard's files hold, what Weights & Biases is handed, and who writes."""

import sys
import time
import types

import pytest
import torch
import yaml
from accelerate.state import PartialState
from accelerate.tracking import GeneralTracker

import pcx
from pcx.training.callbacks import Callback
from pcx.training.trackers import Tracker

QUIET = {"progress": False}
STEPS = 3  # batches of the loader


def model_of(backbone):
    torch.manual_seed(0)
    return pcx.VPT(backbone, 2)


def train(backbone, loader, callbacks, epochs=2, **more):
    arguments = {"epochs": epochs, "lr": 0.1, "val_loader": loader, **QUIET, **more}
    return pcx.fit(model_of(backbone), loader, callbacks=callbacks, **arguments)


class Losses(Callback):
    def __init__(self, stop_at=None):
        self.means, self.stop_at = [], stop_at

    def on_step(self, epoch, step, losses):
        self.means.append(float(losses.mean()))
        if (epoch, step) == self.stop_at:
            raise KeyboardInterrupt


@pytest.fixture
def scalars():
    """{name: [(step, value)]} of what TensorBoard shows of a folder."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard"
    )

    def read(folder):
        found = accumulator.EventAccumulator(str(folder)).Reload()
        return {
            name: [(event.step, event.value) for event in found.Scalars(name)]
            for name in found.Tags()["scalars"]
        }

    return read


def test_tensorboard_has_the_rows_the_losses_and_the_recipe(backbone, loader, tmp_path, scalars):
    losses = Losses()
    tracker = Tracker("tensorboard", project="cars", folder=tmp_path, every=2)
    history = train(backbone, loader, [losses, tracker])
    found = scalars(tmp_path / "cars")
    assert set(found) == {*history[0], "step_loss"}
    for name in history[0]:
        expected = [(STEPS * row["epoch"], pytest.approx(row[name], rel=1e-6)) for row in history]
        assert found[name] == expected, name
    assert found["step_loss"] == [
        (step, pytest.approx(losses.means[step - 1], rel=1e-6)) for step in (2, 4, 6)
    ]
    (file,) = (tmp_path / "cars").rglob("hparams.yml")
    recipe = yaml.safe_load(file.read_text())
    assert (recipe["lr"], recipe["epochs"], recipe["criterion"]) == (0.1, 2, "cross-entropy")
    assert recipe["trained_parameters"] > 0


def test_tensorboard_shows_each_step_of_a_resumed_or_replaced_run_once(
    backbone, loader, tmp_path, scalars
):
    def tracker():
        # TensorBoard reads a run's files in the order of the seconds in their names.
        time.sleep(1.05 - time.time() % 1)
        return Tracker("tensorboard", folder=tmp_path, every=1)

    place = {"checkpoint_dir": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        train(backbone, loader, [tracker(), Losses(stop_at=(3, 2))], epochs=3, **place)
    history = train(backbone, loader, tracker(), epochs=3, resume=True, **place)
    found = scalars(tmp_path / "pcx")
    assert [step for step, _ in found["step_loss"]] == [*range(1, 10)]
    assert [step for step, _ in found["loss"]] == [3, 6, 9]
    # A run that is over has nothing to add.
    train(backbone, loader, tracker(), epochs=3, resume=True, **place)
    assert scalars(tmp_path / "pcx") == found
    lines = (tmp_path / "history.csv").read_text().splitlines()
    assert lines[0].split(",") == list(history[0])
    train(backbone, loader, tracker(), epochs=1, overwrite=True, **place)
    assert [step for step, _ in scalars(tmp_path / "pcx")["step_loss"]] == [1, 2, 3]


@pytest.fixture
def wandb(monkeypatch):
    """A stub in the place of the package, behind Accelerate's own tracker."""
    calls, module = [], types.ModuleType("wandb")

    class Run:
        def log(self, values, step):
            calls.append(("log", values, step))

        def finish(self):
            calls.append(("finish",))

    def init(**given):
        calls.append(("init", given))
        return Run()

    def update(values, **given):
        calls.append(("config", values))

    module.init, module.config = init, types.SimpleNamespace(update=update)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr("pcx.training.trackers.get_available_trackers", lambda: ["wandb"])
    return calls


def test_weights_and_biases(backbone, loader, wandb):
    history = train(backbone, loader, Tracker("wandb", project="cars", every=3), accumulate=2)
    assert [call[0] for call in wandb] == ["init", "config", *["log"] * 4, "finish"]
    assert wandb[0][1] == {"project": "cars"}
    assert wandb[1][1]["accumulate"] == 2
    logged = [call[1:] for call in wandb if call[0] == "log"]
    # Three batches make two updates of two, so that the second epoch begins behind step 4.
    assert [(next(iter(values)), step) for values, step in logged] == [
        ("step_loss", 3), ("epoch", 4), ("step_loss", 6), ("epoch", 8)
    ]  # fmt: skip
    assert logged[-1][0] == history[-1]


class Own(GeneralTracker):
    name, requires_logging_directory, tracker = "own", False, None

    def __init__(self, fails=False):
        super().__init__()
        self.calls, self.fails = [], fails

    def start(self):
        if self.fails:
            raise RuntimeError("no network")
        self.calls.append("start")

    def log(self, values, step=None, **options):
        self.calls.append("log")

    def finish(self):
        self.calls.append("finish")


def test_trackers_are_finished_behind_errors(backbone, loader):
    first = Own()
    with pytest.raises(RuntimeError, match="no network"):
        train(backbone, loader, Tracker([first, Own(fails=True)]))
    assert first.calls == ["start", "finish"]
    second = Own()
    with pytest.raises(KeyboardInterrupt):
        train(backbone, loader, [Tracker(second, every=1), Losses(stop_at=(1, 2))])
    assert second.calls == ["start", "log", "log", "finish"]


def test_the_main_process_alone_writes(backbone, loader, monkeypatch):
    tracker = Own()
    monkeypatch.setattr(PartialState, "is_main_process", property(lambda self: False))
    train(backbone, loader, Tracker(tracker, every=1))
    assert tracker.calls == []


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("tensorbord", "names: got 'tensorbord', expected one or several of .*tensorboard, "),
        (["wandb", 3], "names: got 3, expected"),
        ([], "names: got none"),
        ("tensorboard", "folder: 'tensorboard' writes files; give the folder"),
        ("mlflow", "names: 'mlflow' needs a package .* pip install mlflow"),
    ],
)
def test_what_is_no_tracker_is_named(monkeypatch, names, message):
    there = ["tensorboard", "wandb"]
    monkeypatch.setattr("pcx.training.trackers.get_available_trackers", lambda: there)
    with pytest.raises(ValueError, match=message):
        Tracker(names)
