"""The command `pcx eval`."""

from __future__ import annotations

from pcx.cli import options as o


def evaluate(
    model: o.ModelFile,
    task: o.TaskName,
    backbone: o.FileBackbone = None,
    weights: o.Weights = None,
    split: o.Split = "test",
    batch_size: o.BatchSize = 64,
    root: o.Root = None,
    amp: o.Amp = "no",
    workers: o.Workers = 0,
    cache: o.Cache = None,
    config: o.Config = None,
) -> None:
    """Accuracy of a saved model on a split."""
    from pcx.backbones.inputs import data_config
    from pcx.tasks import load_task

    loaded = o.loaded_model(model, backbone, weights)
    data = load_task(task, data_config(loaded), root=root, cache=cache)
    o.say_accuracy(loaded, data, batch_size, amp, split, workers)
