"""Scores from each sample's own gradients and attention, in one pass over the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pcx.condensation.prompt_path import PromptPath
from pcx.condensation.reading import Reader, Scores
from pcx.models.vpt.block import Observer
from pcx.models.vpt.model import VPT
from pcx.ops.prompt_score import prompt_score
from pcx.training.execution import Replayed

AddScores = Callable[[int, Tensor], None]  # of a layer, [2, B, m] as prompt_score gives them


def score_in_one_pass(
    reader: Reader, methods: Sequence[str], cuda_graph: bool
) -> dict[str, Scores]:
    """Per-sample gradients by giving every sample its own prompts, or their keys and values."""
    if not methods:
        return {}
    counts = reader.model.counts
    totals = torch.zeros(len(methods), sum(counts), dtype=torch.float64, device=reader.device)
    make = partial(_GradientPass, reader, methods)
    one_pass: Callable[..., tuple] = Replayed(make, reader.device) if cuda_graph else make()
    for images, labels in reader.batches("scoring"):
        losses, rows = one_pass(images, labels)
        reader.check(losses)
        totals += rows.double().sum(1)
    return {
        m: reader.means(list(sums.split(counts))) for m, sums in zip(methods, totals, strict=True)
    }


class _GradientPass:
    """What one pass over the data computes, and what all its batches have in common."""

    def __init__(self, reader: Reader, methods: Sequence[str]):
        self.reader, self.methods = reader, methods
        model = self.model = reader.model
        self.used = [i for i, m in enumerate(model.counts) if m]
        self.shallow = model.kind == "shallow"
        self.differentiated = self.used if {"taylor", "taylor-inner"} & set(methods) else []
        self.paths: dict[int, PromptPath] | None = None
        if not (self.shallow or model.path == "concat"):
            with reader.autocast():
                self.paths = {
                    i: PromptPath(model.layers[i], model.prompts[i]) for i in self.differentiated
                }

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [B], and scores of the methods for all layers' prompts [methods, B, all m]."""
        model, batch, scale = self.model, len(labels), self.reader.loss_scale
        arrived: dict[int, Tensor] = {}

        watched = range(len(model.layers)) if self.shallow else self.used
        anchor = torch.zeros((), device=self.reader.device, requires_grad=True)
        give = (
            _give_prompts(model, self.differentiated, batch, anchor, arrived.__setitem__)
            if self.paths is None
            else _give_keys(model, self.paths, batch, anchor, arrived.__setitem__)
        )
        with (
            _observed(model, watched, self.methods, batch) as observers,
            torch.enable_grad(),
            give as prompts,
        ):
            losses = self.reader.losses(prompts, images, labels)
            leaves = [o.gate for o in observers.values() if o.gate is not None]
            leaves += [anchor] if self.differentiated else []
            if leaves and losses.requires_grad:
                (losses.sum() * scale).backward(inputs=leaves)
        if sorted(arrived) != self.differentiated:
            raise RuntimeError("model: some prompts have no influence on the loss")
        found = self._observed_scores(observers, scale)
        if arrived:
            both = torch.cat([arrived[i] for i in self.used], -1).detach() / scale
            found |= {"taylor": both[0], "taylor-inner": both[1]}
        return losses.detach(), torch.stack([found[m] for m in self.methods])

    def _observed_scores(self, observers: dict[int, Observer], scale: float) -> dict[str, Tensor]:
        """Of "gate" and "cls-attention", [B, all m]."""
        found = {}
        if "gate" in self.methods:
            slopes: list[Any] = [o.gate.grad for o in observers.values() if o.gate is not None]
            by_layer = [torch.stack(s).sum(0) for s in _per_prompts(self.model, slopes)]
            found["gate"] = torch.cat(by_layer, -1).abs() / scale
        if "cls-attention" in self.methods:
            weights = [torch.stack(o.cls_attention).mean(0) for o in observers.values()]
            by_layer = [torch.stack(w).mean(0) for w in _per_prompts(self.model, weights)]
            found["cls-attention"] = torch.cat(by_layer, -1)
        return found


class _Tap(torch.autograd.Function):
    """Passes tensors on; calls `then` with their gradients in the backward pass and keeps none.

    The backward pass comes by for the sake of `anchor`, a leaf that gets no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, then: Callable[..., None], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.then = then
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        ctx.then(grads)
        return (None,) * (2 + len(grads))


@contextmanager
def _give_keys(
    model: VPT, paths: dict[int, PromptPath], batch: int, anchor: Tensor, add: AddScores
) -> Iterator[dict[str, Tensor]]:
    """Gives every sample keys and values of its own, which take no memory of their own.

    A prompt acts on a sample through its key and value alone, and these are the same for all. So
    they are computed once for the data set; their gradients are each sample's, and are led back to
    the prompts layer by layer as the backward pass comes by.
    """
    try:
        for i, path in paths.items():
            own = _Tap.apply(anchor, partial(_score_keys, i, path, add), *path.given(batch))
            model.layers[i].given = list(zip(own[::2], own[1::2], strict=True))
        yield {}
    finally:
        for layer in model.layers:
            layer.given = None


def _score_keys(i: int, path: PromptPath, add: AddScores, grads: Sequence[Tensor]) -> None:
    add(i, path.scores(grads))


@contextmanager
def _give_prompts(
    model: VPT, layers: Sequence[int], batch: int, anchor: Tensor, add: AddScores
) -> Iterator[dict[str, Tensor]]:
    """Gives every sample prompts of its own, for paths that prompts take as tokens."""
    given = {}
    for i in layers:
        prompts = model.prompts[i].detach()
        then = partial(_score_prompts, i, prompts, add)
        (given[f"prompts.{i}"],) = _Tap.apply(anchor, then, prompts.expand(batch, *prompts.shape))
    yield given


def _score_prompts(i: int, prompts: Tensor, add: AddScores, grads: Sequence[Tensor]) -> None:
    add(i, prompt_score(grads[0], prompts))


def _per_prompts(model: VPT, by_layer: list[Tensor]) -> list[list[Tensor]]:
    """Groups what was seen in each watched layer by the prompts it belongs to.

    A travelling prompt is a key of every layer, any other of its own alone.
    """
    return [by_layer] if model.kind == "shallow" else [[one] for one in by_layer]


@contextmanager
def _observed(
    model: VPT, layers: Sequence[int], methods: Sequence[str], batch: int
) -> Iterator[dict[int, Observer]]:
    observers: dict[int, Observer] = {}
    try:
        if {"gate", "cls-attention"} & set(methods):
            for i in layers:
                width = model.counts[0 if model.kind == "shallow" else i]
                observer = Observer(watch_cls="cls-attention" in methods)
                if "gate" in methods:
                    like = model.prompts[i]
                    observer.gate = torch.zeros(
                        batch, width, device=like.device, dtype=like.dtype, requires_grad=True
                    )
                observers[i] = model.layers[i].observer = observer
        yield observers
    finally:
        for i in observers:
            model.layers[i].observer = None
