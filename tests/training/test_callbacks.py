"""Callbacks, early stopping, the best epoch, moving averages, accumulated gradients, displays."""

import subprocess
import sys

import pytest
import torch
from own_states import assert_same, weights
from torch.utils.data import DataLoader, TensorDataset

import pcx
from pcx.training.callbacks import Callback, EarlyStopping
from pcx.training.display import Display

QUIET = {"progress": False}


class Seen(Callback):
    def __init__(self, stop_after=None):
        self.steps, self.epochs, self.ended, self.stop_after = [], [], [], stop_after

    def on_step(self, epoch, step, losses):
        self.steps.append((epoch, step, losses.tolist()))

    def on_epoch(self, history):
        self.epochs.append([row["epoch"] for row in history])
        return len(history) == self.stop_after

    def on_end(self, history):
        self.ended.append(len(history))


def model_of(backbone, seed=0):
    torch.manual_seed(seed)
    return pcx.VPT(backbone, 2)


def test_callbacks_are_called_where_they_say(backbone, loader):
    seen = Seen(stop_after=2)
    history = pcx.fit(model_of(backbone), loader, epochs=5, lr=0.1, callbacks=seen, **QUIET)
    assert len(history) == 2
    assert [step[:2] for step in seen.steps] == [(e, s) for e in (1, 2) for s in (1, 2, 3)]
    assert [len(losses) for _, _, losses in seen.steps] == [4, 4, 2] * 2
    first = [x for epoch, _, losses in seen.steps if epoch == 1 for x in losses]
    assert sum(first) / 10 == pytest.approx(history[0]["loss"])
    assert (seen.epochs, seen.ended) == ([[1], [1, 2]], [2])


def test_an_interrupted_training_has_no_end(backbone, loader):
    class Fails(Seen):
        def on_step(self, epoch, step, losses):
            raise KeyboardInterrupt

    seen = Fails()
    with pytest.raises(KeyboardInterrupt):
        pcx.fit(model_of(backbone), loader, epochs=1, lr=0.1, callbacks=[seen], **QUIET)
    assert seen.ended == []


@pytest.mark.parametrize(
    ("metric", "values", "patience", "length"),
    [
        ("val_accuracy", [1, 3, 2, 3, 2, 9], 2, 4),
        ("val_accuracy", [1, 2, 3, 4], 1, 4),
        ("val_loss", [3, 2, 2, 2, 1], 2, 4),
        ("mean_absolute_error", [3, 4, 1], 1, 2),
    ],
)
def test_early_stopping(metric, values, patience, length):
    stopping, history = EarlyStopping(metric, patience), []
    for value in values:
        history.append({"epoch": len(history) + 1, metric: value})
        if stopping.on_epoch(history):
            break
    assert len(history) == length


def test_early_stopping_resumes_as_undisturbed(backbone, loader, tmp_path):
    stop = {"callbacks": [EarlyStopping("loss", patience=1)], "lr": 3.0, "epochs": 12, **QUIET}
    whole = model_of(backbone)
    expected = pcx.fit(whole, loader, checkpoint_dir=tmp_path / "a", **stop)
    assert len(expected) < 12
    again = model_of(backbone)
    history = pcx.fit(again, loader, checkpoint_dir=tmp_path / "a", resume=True, **stop)
    assert len(history) == len(expected)
    assert_same(weights(again), weights(whole))


@pytest.fixture
def other_labels(dataset):
    """Validation data whose labels are others: the better the training, the worse its loss."""
    images, labels = dataset.tensors
    return DataLoader(TensorDataset(images, (labels + 1) % 3), batch_size=4)


def test_the_best_epoch_is_what_the_model_ends_with(backbone, loader, other_labels):
    kept = []

    class Keeps(Callback):
        def on_epoch(self, history):
            kept.append(weights(model))

    model = model_of(backbone)
    history = pcx.fit(
        model, loader, epochs=6, lr=0.3, val_loader=other_labels, best="val_loss",
        callbacks=Keeps(),
        **QUIET,
    )  # fmt: skip
    losses = [row["val_loss"] for row in history]
    place = losses.index(min(losses))
    assert place < 5
    assert_same(weights(model), kept[place])
    assert pcx.evaluate(model, other_labels)["loss"] == pytest.approx(min(losses))


def test_the_best_epoch_survives_resuming(backbone, loader, other_labels, tmp_path):
    arguments = {"epochs": 6, "lr": 0.3, "val_loader": other_labels, "best": "val_loss", **QUIET}
    whole = model_of(backbone)
    history = pcx.fit(whole, loader, **arguments, checkpoint_dir=tmp_path / "a")
    best = min(range(6), key=lambda i: history[i]["val_loss"])
    assert best + 3 < 6

    class Breaks(Callback):
        def on_step(self, epoch, step, losses):
            if epoch == best + 3:
                raise KeyboardInterrupt

    folder = {"checkpoint_dir": tmp_path / "b"}
    with pytest.raises(KeyboardInterrupt):
        pcx.fit(model_of(backbone), loader, callbacks=Breaks(), **arguments, **folder)
    resumed = model_of(backbone, seed=1)
    pcx.fit(resumed, loader, **arguments, **folder, resume=True)
    assert_same(weights(resumed), weights(whole))
    with pytest.raises(ValueError, match=r"resume: .* best='val_loss' \(now 'loss'\)"):
        pcx.fit(resumed, loader, **{**arguments, "best": "loss"}, **folder, resume=True)


def test_a_moving_average(backbone, loader, tmp_path):
    seen = []

    class Follows(Callback):
        def on_step(self, epoch, step, losses):
            seen.append({n: p.detach().clone() for n, p in model.trainable().items()})

    model = model_of(backbone)
    expected = {n: p.detach().clone() for n, p in model.trainable().items()}
    history = pcx.fit(
        model, loader, epochs=3, lr=0.3, ema=0.8, val_loader=loader, callbacks=Follows(), **QUIET
    )
    for number, now in enumerate(seen, 1):
        decay = min(0.8, (1 + number) / (10 + number))
        expected = {n: decay * e + (1 - decay) * now[n] for n, e in expected.items()}
    for name, parameter in model.trainable().items():
        torch.testing.assert_close(parameter.detach(), expected[name])
    assert pcx.evaluate(model, loader)["loss"] == pytest.approx(history[-1]["val_loss"])
    whole = model_of(backbone)
    arguments = {"epochs": 3, "lr": 0.3, "ema": 0.8, "val_loader": loader, **QUIET}

    class Breaks(Callback):
        def on_step(self, epoch, step, losses):
            if epoch == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pcx.fit(whole, loader, **arguments, callbacks=Breaks(), checkpoint_dir=tmp_path)
    resumed = model_of(backbone, seed=2)
    pcx.fit(resumed, loader, **arguments, checkpoint_dir=tmp_path, resume=True)
    assert_same(weights(resumed), weights(model))


def test_accumulated_batches_are_one(backbone, dataset):
    found = []
    for size, accumulate in ((10, 1), (5, 2), (4, 3)):
        torch.manual_seed(0)
        model = pcx.VPT(backbone, 2)
        batches = DataLoader(dataset, batch_size=size)
        history = pcx.fit(model, batches, epochs=3, lr=0.3, accumulate=accumulate, **QUIET)
        found.append((weights(model), history[-1]["loss"]))
    for name, tensor in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], tensor)
    assert found[1][1] == pytest.approx(found[0][1])
    # The mean over batches of 4, 4 and 2 images weighs those of the last twice as much.
    assert not torch.equal(found[2][0]["prompts.0"], found[0][0]["prompts.0"])


def test_the_last_batches_of_an_epoch_make_an_update(backbone, loader, tmp_path):
    model = model_of(backbone)
    pcx.fit(model, loader, epochs=2, lr=0.1, accumulate=2, checkpoint_dir=tmp_path, **QUIET)
    assert torch.load(tmp_path / "last.pt")["updates"] == 4  # of 3 batches each
    with pytest.raises(ValueError, match=r"accumulate 2 \(now 1\)"):
        pcx.fit(model, loader, epochs=2, lr=0.1, checkpoint_dir=tmp_path, resume=True, **QUIET)


CODE = """
import timm, torch, pcx
torch.manual_seed(0)
backbone = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
loader = [(torch.randn(4, 3, 32, 32), torch.arange(4) % 3)] * 2
pcx.fit(pcx.VPT(backbone, 2), loader, epochs=5, lr=0.01)
"""


def test_without_a_terminal_each_epoch_has_a_plain_line():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if "loss" in line]
    assert [line.split(":")[0] for line in lines] == [f"epoch {i}/5" for i in range(1, 6)]
    assert "\x1b" not in done.stdout


def test_long_epochs_show_that_they_go_on(backbone, loader, capsys, monkeypatch):
    monkeypatch.setattr(Display, "SILENCE", 0.0)
    pcx.fit(model_of(backbone), loader, epochs=1, lr=0.1)
    said = capsys.readouterr().out
    assert "epoch 1/1: batch 1 of 3" in said
    assert "epoch 1/1: batch 3 of 3" in said


def test_a_refused_resume_changes_nothing(backbone, loader, tmp_path):
    arguments = {"epochs": 2, "lr": 0.1, "checkpoint_dir": tmp_path, **QUIET}
    pcx.fit(model_of(backbone), loader, best="loss", **arguments)
    other = model_of(backbone, seed=1)
    before = weights(other)
    with pytest.raises(ValueError, match=r"resume: .* best='loss' \(now None\)"):
        pcx.fit(other, loader, resume=True, **arguments)
    assert_same(weights(other), before)


def test_nan_is_no_improvement():
    stopping, nan = EarlyStopping("val_mean_average_precision", 2), float("nan")
    rows = [{"epoch": i, "val_mean_average_precision": v} for i, v in enumerate([nan, 1.0, 2.0])]
    assert not stopping.on_epoch(rows)
    rows += [{"epoch": 3, "val_mean_average_precision": nan}] * 2
    assert stopping.on_epoch(rows)


@pytest.mark.parametrize("column", ["seconds", "epoch", "loader_share", 3])
def test_columns_that_say_nothing_of_a_model_are_refused(backbone, loader, column):
    with pytest.raises(ValueError, match=f"metric: {column!r}, expected a column"):
        EarlyStopping(column)
    with pytest.raises(ValueError, match=f"best: {column!r}, expected a column"):
        pcx.fit(model_of(backbone), loader, epochs=1, lr=0.1, best=column, **QUIET)
