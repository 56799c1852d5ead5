"""Scores from each sample's own gradients and attention, in one pass over the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pcx.condensation.prompt_path import PromptPath
from pcx.condensation.reading import Reader, Scores
from pcx.condensation.score_methods import PerSample, Seen
from pcx.models.vpt.probes import Probe, probing
from pcx.ops.prompt_score import prompt_score
from pcx.training.execution import prepared
from pcx.training.losses import seen_losses

AddScores = Callable[[int, Tensor], None]  # of a layer, [2, B, m] as prompt_score gives them


def score_in_one_pass(
    reader: Reader, methods: Mapping[str, PerSample], execution: str
) -> dict[str, Scores]:
    """Scores every sample in one pass: each sample has prompts, or keys and values, of its own."""
    if not methods:
        return {}
    counts = reader.model.counts
    totals = torch.zeros(len(methods), sum(counts), dtype=torch.float64, device=reader.device)
    make = partial(_GradientPass, reader, list(methods.values()))
    one_pass = prepared(make, reader.device, execution)
    checked = reader.checked_later()
    for images, labels in reader.batches("scoring"):
        losses, rows = one_pass(images, labels)
        checked.add(losses)
        totals += rows.double().sum(1)
    checked.look()
    return {
        m: reader.means(list(sums.split(counts))) for m, sums in zip(methods, totals, strict=True)
    }


class _GradientPass:
    """What one pass over the data computes, and what all its batches have in common."""

    def __init__(self, reader: Reader, methods: Sequence[PerSample]):
        self.reader, self.methods = reader, methods
        self.observed = frozenset[str]().union(*(method.observes for method in methods))
        model = self.model = reader.model
        self.used = [i for i, m in enumerate(model.counts) if m]
        self.shallow = model.kind == "shallow"
        self.watched = range(len(model.layers)) if self.shallow else self.used
        self.differentiated = self.used if "gradient" in self.observed else []
        self.paths: dict[int, PromptPath] | None = None
        if not (self.shallow or model.path == "concat"):
            with reader.autocast():
                self.paths = {
                    i: PromptPath(model.layers[i], model.prompts[i]) for i in self.differentiated
                }

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Computes a batch's losses [B] and the methods' scores [methods, B, all layers' m]."""
        scale = self.reader.loss_scale
        arrived: dict[int, Tensor] = {}
        anchor = torch.zeros((), device=self.reader.device, requires_grad=True)
        with torch.enable_grad():
            probes = self._probes(len(labels))
            prompts = self._give(probes, len(labels), anchor, arrived.__setitem__)
            with probing(self.model.layers, probes):
                losses = self.reader.losses(prompts, images, labels)
                leaves = [p.gate for p in probes.values() if p.gate is not None]
                leaves += [anchor] if self.differentiated else []
                if leaves and losses.requires_grad:
                    (losses.sum() * scale).backward(inputs=leaves)
        if sorted(arrived) != self.differentiated:
            raise RuntimeError("model: some prompts have no influence on the loss")
        seen = self._seen(list(probes.values()), arrived, scale)
        rows: list[Any] = [method.reduce(seen) for method in self.methods]
        return seen_losses(losses, images), torch.stack(rows)

    def _probes(self, batch: int) -> dict[int, Probe]:
        """A probe for each watched layer, with a gate for each sample and prompt where needed."""
        model, probes = self.model, {}
        for i in self.watched if self.observed else ():
            probes[i] = Probe(watch_cls="cls" in self.observed)
            if "gate" in self.observed:
                like, width = model.prompts[i], model.counts[0 if self.shallow else i]
                probes[i].gate = torch.zeros(
                    batch, width, device=like.device, dtype=like.dtype, requires_grad=True
                )
        return probes

    def _give(
        self, probes: dict[int, Probe], batch: int, anchor: Tensor, add: AddScores
    ) -> dict[str, Tensor]:
        """Gives every sample prompts of its own, or keys and values, which take no memory.

        A folded prompt acts on a sample through its key and value alone, and these are the same for
        all. So they are computed once for the data set; their gradients are each sample's, and are
        led back to the prompts layer by layer as the backward pass comes by.

        Returns:
            Prompts to swap in by name, for paths that prompts take as tokens.
        """
        prompts: dict[str, Tensor] = {}
        for i in self.differentiated:
            if self.paths is not None:
                then = partial(_score_keys, i, self.paths[i], add)
                own = _Tap.apply(anchor, then, *self.paths[i].given(batch))
                probes[i].given = list(zip(own[::2], own[1::2], strict=True))
            else:
                row = self.model.prompts[i].detach()
                then = partial(_score_prompts, i, row, add)
                (given,) = _Tap.apply(anchor, then, row.expand(batch, *row.shape))
                prompts[f"prompts.{i}"] = given
        return prompts

    def _seen(self, probes: list[Probe], arrived: dict[int, Tensor], scale: float) -> Seen:
        found: dict[str, Tensor] = {}
        if arrived:
            both = torch.cat([arrived[i] for i in self.used], -1).detach() / scale
            found |= {"norm": both[0], "inner": both[1]}
        if "gate" in self.observed:
            slopes: list[Any] = [_slope(p.gate) for p in probes if p.gate is not None]
            by_layer = [torch.stack(s).sum(0) for s in self._by_prompts(slopes)]
            found["slope"] = torch.cat(by_layer, -1) / scale
        if "cls" in self.observed:
            weights = [torch.stack(p.cls_attention).mean(0) for p in probes]
            by_layer = [torch.stack(w).mean(0) for w in self._by_prompts(weights)]
            found["cls_attention"] = torch.cat(by_layer, -1)
        return Seen(**found)

    def _by_prompts(self, by_layer: list[Tensor]) -> list[list[Tensor]]:
        """Groups what was seen in each watched layer by the prompts it belongs to.

        A travelling prompt is a key of every layer, any other of its own alone.
        """
        return [by_layer] if self.shallow else [[one] for one in by_layer]


def _slope(gate: Tensor) -> Tensor:
    """The gradient by a gate, zeros where no prompt came by it."""
    return torch.zeros_like(gate) if gate.grad is None else gate.grad


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


def _score_keys(i: int, path: PromptPath, add: AddScores, grads: Sequence[Tensor]) -> None:
    add(i, path.scores(grads))


def _score_prompts(i: int, prompts: Tensor, add: AddScores, grads: Sequence[Tensor]) -> None:
    add(i, prompt_score(grads[0], prompts))
