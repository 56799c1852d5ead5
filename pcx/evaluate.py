"""Accuracy and loss over a loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DataLoaderConfiguration, parse_flag_from_env
from torch import Tensor, nn

Criterion = Callable[[Tensor, Tensor], Tensor]


@contextmanager
def accelerator_for(amp: str = "no", seed: int = 0) -> Iterator[Accelerator]:
    """An Accelerator for one call alone; the caller's own, of whatever precision, is put back."""
    if amp not in ("no", "bf16", "fp16"):
        raise ValueError(f"amp: got {amp!r}, expected 'no', 'bf16' or 'fp16'")
    before = dict(AcceleratorState._shared_state)
    AcceleratorState._reset_state(reset_partial_state=False)
    # Processes must shuffle alike; one alone shuffles by the loader's or torch's own generator.
    processes = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).num_processes
    loading = DataLoaderConfiguration(use_seedable_sampler=processes > 1, data_seed=seed)
    try:
        yield Accelerator(mixed_precision=amp, dataloader_config=loading)
    finally:
        AcceleratorState._shared_state.clear()
        AcceleratorState._shared_state.update(before)


def gathered(accelerator: Accelerator, *tensors: Tensor) -> tuple[Tensor, ...]:
    """One row per sample from all processes, without the samples that padded the last batch."""
    if accelerator.num_processes == 1:  # nothing to drop, whatever the sampler's length
        return tensors
    return accelerator.gather_for_metrics(tensors)


def evaluate(
    model: nn.Module, loader, *, criterion: Criterion | None = None, amp: str = "no"
) -> dict:
    """Accuracy and mean loss; each sample counts once, also where processes share the loader.

    Args:
        model: maps images to logits [B, C]; moved to the accelerator's device and put in eval mode
            for the length of the call.
        loader: yields (images, labels), or dicts of "pixel_values" and "labels".
        criterion: (logits, labels) -> one loss per sample [B]; cross-entropy by default.
        amp: "no", "bf16" or "fp16".

    Returns:
        {"accuracy": percent, "loss": mean, "samples": count}.

    Raises:
        ValueError: the loader is empty, or the criterion does not give one value per sample.
    """
    with accelerator_for(amp) as accelerator:
        model.to(accelerator.device)
        return evaluate_on(accelerator, model, accelerator.prepare(loader), criterion)


@torch.no_grad()
def evaluate_on(
    accelerator: Accelerator, model: nn.Module, loader, criterion: Criterion | None = None
) -> dict:
    """`evaluate` with a model on the accelerator's device and a loader it has prepared."""
    modes = [(module, module.training) for module in model.modules()]
    loss, correct, samples = 0.0, 0, 0
    model.eval()
    try:
        for batch in loader:
            images, labels = images_and_labels(batch)
            with accelerator.autocast():
                logits = model(images)
            losses = per_sample_loss(logits, labels, criterion)
            losses, hits = gathered(accelerator, losses, logits.argmax(-1) == labels)
            loss += float(losses.double().sum())
            correct += int(hits.sum())
            samples += len(losses)
    finally:
        for module, training in modes:
            module.training = training
    if not samples:
        raise ValueError("loader: it yielded no sample")
    return {"accuracy": 100 * correct / samples, "loss": loss / samples, "samples": samples}


def images_and_labels(batch) -> tuple:
    """The two parts of a loader's batch: (images, labels), or Hugging Face's dict of both.

    The images may themselves be whatever the model takes, such as NaFlexViT's dict of patches.
    """
    if isinstance(batch, Mapping) and set(batch) == {"pixel_values", "labels"}:
        return batch["pixel_values"], batch["labels"]
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        what = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else batch
        if isinstance(batch, Mapping):
            what = f"a dict of {sorted(batch)}"
        raise ValueError(
            f"loader: it yields {what}, expected (images, labels), or a dict of 'pixel_values' and "
            "'labels'"
        )
    return batch[0], batch[1]


def per_sample_loss(
    logits: Tensor, labels: Tensor, criterion: Criterion | None = None, *, check: bool = True
) -> Tensor:
    """The loss of each sample, [B] float32 or wider; cross-entropy by default.

    Labels are [B], integers; `check` looks at their values, for which a GPU has to be waited for.
    """
    if labels.dim() != 1 or labels.is_floating_point() or len(labels) != len(logits):
        raise ValueError(
            f"loader: labels of shape {tuple(labels.shape)} and {labels.dtype}, expected one class "
            f"per image, integers [{len(logits)}]"
        )
    labels = labels.long()
    if criterion is None:
        if check:
            check_labels(label_range(labels), logits.shape[-1])
        return F.cross_entropy(_at_least_float32(logits), labels, reduction="none")
    losses = criterion(_at_least_float32(logits), labels)
    if losses.shape != labels.shape[:1]:
        raise ValueError(
            f"criterion: gave shape {tuple(losses.shape)}, expected one loss per sample "
            f"[{labels.shape[0]}]; use reduction='none'"
        )
    return losses


def criterion_name(criterion: Criterion | None) -> str:
    """What tells criteria apart in a file."""
    if criterion is None:
        return "cross-entropy"
    return getattr(criterion, "__qualname__", None) or repr(criterion)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def label_range(labels: Tensor) -> tuple[int, int]:
    """The lowest and the highest, (0, 0) of none; a GPU that has them is waited for."""
    return (int(labels.min()), int(labels.max())) if labels.numel() else (0, 0)


def check_labels(seen: tuple[int, int], classes: int) -> None:
    low, high = seen
    if low < 0 or high >= classes:
        raise ValueError(
            f"loader: labels {low}..{high} for a head of {classes} classes; "
            "give VPT num_classes, or map the labels to 0..C-1"
        )
