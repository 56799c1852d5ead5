"""Measures the time per image of a model's forward pass."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from pcx.backbones.inputs import data_config
from pcx.models.vpt.model import VPT


@torch.inference_mode()
def milliseconds_per_image(model: nn.Module, *, batch: int = 32, repeats: int = 10) -> float:
    """Median wall-clock time of a forward pass in eval mode, divided by the batch.

    Args:
        model: the model, on the device to measure. Its mode is restored.
        batch: number of images per pass.
        repeats: number of timed passes, after two passes that warm up.

    Returns:
        Milliseconds per image.
    """
    device = next(model.parameters()).device
    dtype = next(model.parameters()).dtype
    images = torch.randn(batch, *data_config(model)["input_size"], device=device, dtype=dtype)
    was_training = model.training
    model.eval()
    times = []
    for i in range(repeats + 2):
        start = time.perf_counter()
        model(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if i >= 2:
            times.append(time.perf_counter() - start)
    model.train(was_training)
    return 1000 * statistics.median(times) / batch


def by_path(model: VPT, *, batch: int = 32, repeats: int = 10) -> dict[str, float]:
    """Milliseconds per image of a VPT on each path, {"folded": ..., "concat": ...}.

    Every token of the last layer is computed on both paths, so that they do the same work.
    """
    whole = model.keep([torch.arange(m) for m in model.counts])
    for layer in whole.layers:
        layer.read_tokens = None
    found = {}
    for path in ("folded", "concat"):
        whole.path = path
        found[path] = milliseconds_per_image(whole, batch=batch, repeats=repeats)
    return found
