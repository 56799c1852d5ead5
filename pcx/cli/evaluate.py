"""The command `pcx eval`."""

from __future__ import annotations

from pcx.cli import options as o


def evaluate(
    model: o.ModelFile,
    photos: o.Photos = None,
    task: o.TaskName = None,
    backbone: o.FileBackbone = None,
    weights: o.Weights = None,
    split: o.HeldOut = None,
    batch_size: o.BatchSize = 64,
    root: o.Root = None,
    amp: o.Amp = "no",
    workers: o.Workers = 0,
    cache: o.Cache = None,
    top5: o.TopFive = False,
    config: o.Config = None,
) -> None:
    """Accuracy of a saved model on a split."""
    name = o.one_task(photos, task)
    loaded = o.loaded_model(model, backbone, weights)
    data = o.task_for(loaded, name, root, cache)
    o.say_accuracy(loaded, data, batch_size, amp, split, workers, top5=top5)
