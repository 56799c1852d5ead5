"""How much each prompt matters, from gradients, attention or its real removal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, overload

import torch
from accelerate.utils import send_to_device
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.func import functional_call

from pcx.data import data_config, plain_loader
from pcx.evaluate import Criterion, images_and_labels, per_sample_loss
from pcx.prompted_block import Observer
from pcx.vpt import VPT

GRADIENT = ("taylor", "taylor-inner", "gate")
ONE_PASS = (*GRADIENT, "cls-attention")
REMOVAL = ("exact", "exact-zero")
METHODS = (*ONE_PASS, "magnitude", "random", *REMOVAL)

Scores = list[Tensor]


@overload
def score(
    model: VPT,
    loader,
    *,
    method: str = "taylor",
    criterion: Criterion | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Scores: ...


@overload
def score(
    model: VPT,
    loader,
    *,
    method: Sequence[str],
    criterion: Criterion | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Scores]: ...


def score(
    model: VPT,
    loader,
    *,
    method: str | Sequence[str] = "taylor",
    criterion: Criterion | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Scores | dict[str, Scores]:
    """Scores every prompt over a data set (Prompt Condensation, Eq. 13-16).

    With g = dL_d / dp_i, the gradient of sample d's own loss by prompt i, the methods are

    - taylor: mean_d ||g * p_i||_2, Eq. 16 with the elementwise product (the default);
    - taylor-inner: mean_d |<g, p_i>|, its reading as an inner product;
    - gate: mean_d |sum over heads and queries of dL_d / ds_i|, s_i the attention logits of key i:
      the first-order effect of removing the key;
    - cls-attention: the attention of [CLS] to the prompt, mean over samples and heads ([CLS]-Sim);
    - magnitude: ||p_i||_2; random: uniform, from `seed`;
    - exact: mean_d |L_d without the prompt - L_d|, the prompt really removed, one pass per prompt;
    - exact-zero: the same with the prompt set to zero, Eq. 13's words, which leaves its key in
      place.

    Each sample is read once, in order, without augmentation, dropout or a dropped last batch.

    Args:
        model: a VPT; not changed.
        loader: yields (images, labels).
        method: a method, or several, whose gradients then come from the same pass.
        criterion: (logits, labels) -> one loss per sample [B]; cross-entropy by default.
        seed: of "random".
        progress: show a bar and what was read.

    Returns:
        Per layer, [m_l] float64 on the CPU; for several methods a dict of such lists.

    Raises:
        ValueError: no such method, an empty loader, a model without prompts or (cls-attention)
            without
            [CLS], a criterion that does not give one value per sample, or a loss that is not finite
            (names the sample).
    """
    methods = (method,) if isinstance(method, str) else tuple(method)
    unknown = [m for m in methods if m not in METHODS]
    if unknown or not methods:
        raise ValueError(f"method: got {unknown or methods}, expected some of {METHODS}")
    if not isinstance(model, VPT):
        raise ValueError(f"model: a {type(model).__name__}, expected a pcx.VPT")
    if "cls-attention" in methods and not model.anatomy.has_cls:
        raise ValueError(
            f"method: 'cls-attention' needs a [CLS] token; {model.anatomy.family} has none"
        )
    if not sum(model.counts):
        raise ValueError("model: it has no prompts to score")
    found = _without_data(model, methods, seed)
    if set(methods) - set(found):
        plain = plain_loader(loader, data_config(model))
        with _as_scored(model):
            reader = _Reader(model, plain.loader, criterion, progress)
            found |= _one_pass(reader, [m for m in methods if m in ONE_PASS])
            for name in REMOVAL:
                if name in methods:
                    found[name] = _by_removal(reader, name)
        Console(quiet=not progress).print(
            f"scored {sum(model.counts)} prompts on {reader.samples} samples; {plain.description}"
        )
    return found[method] if isinstance(method, str) else {name: found[name] for name in methods}


def _without_data(model: VPT, methods: Sequence[str], seed: int) -> dict[str, Scores]:
    found = {}
    if "magnitude" in methods:
        found["magnitude"] = [_rows(p.detach(), model.kind).norm(dim=-1) for p in model.prompts]
    if "random" in methods:
        generator = torch.Generator().manual_seed(seed)
        found["random"] = [
            torch.rand(m, generator=generator, dtype=torch.float64) for m in model.counts
        ]
    return {name: [s.double().cpu() for s in scores] for name, scores in found.items()}


def _rows(prompts: Tensor, kind: str) -> Tensor:
    """One row of numbers per prompt, [..., m, *]: kind "prefix" has a key and a value row."""
    return prompts.transpose(-3, -2).flatten(-2) if kind == "prefix" else prompts


@contextmanager
def _as_scored(model: VPT) -> Iterator[None]:
    """Eval mode, and no checkpointing: a block would be run again after the prompts were swapped
    back."""
    was_training, layers = model.training, [layer.checkpoint for layer in model.layers]
    backbone_too = getattr(model.backbone, "grad_checkpointing", None)
    model.eval()
    model.set_grad_checkpointing(False)
    if backbone_too is not None:
        model.backbone.grad_checkpointing = False
    try:
        yield
    finally:
        model.train(was_training)
        for layer, checkpoint in zip(model.layers, layers, strict=True):
            layer.checkpoint = checkpoint
        if backbone_too is not None:
            model.backbone.grad_checkpointing = backbone_too


@dataclass
class _Reader:
    """Yields the loader's batches on the model's device and counts its samples."""

    model: VPT
    loader: Any
    criterion: Criterion | None
    progress: bool
    samples: int = 0

    def batches(self, note: str) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.model.prompts[0].device
        self.samples = 0
        for batch in track(self.loader, note, disable=not self.progress, transient=True):
            images, labels = send_to_device(images_and_labels(batch), device)
            yield images, labels
            self.samples += len(labels)
        if not self.samples:
            raise ValueError("loader: it yielded no sample")

    def losses(self, prompts: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        """The loss of each sample with some prompts swapped for others, [B]."""
        logits = functional_call(self.model, prompts, (images,))
        losses = per_sample_loss(logits, labels, self.criterion)
        bad = (~losses.detach().isfinite()).nonzero()
        if len(bad):
            raise ValueError(
                f"loader: the loss of sample {self.samples + int(bad[0])} is not finite"
            )
        return losses


def _one_pass(reader: _Reader, methods: Sequence[str]) -> dict[str, Scores]:
    """Per-sample gradients by giving every sample its own prompts, or their keys and values."""
    if not methods:
        return {}
    model = reader.model
    totals = {m: [torch.zeros(c, dtype=torch.float64) for c in model.counts] for m in methods}
    for images, labels in reader.batches("scoring"):
        for name, layer, rows in _batch_scores(reader, methods, images, labels):
            totals[name][layer] += rows.detach().double().sum(0).cpu()  # rows [B, m]
    return {m: [t / reader.samples for t in layers] for m, layers in totals.items()}


def _batch_scores(
    reader: _Reader, methods: Sequence[str], images: Tensor, labels: Tensor
) -> list[tuple[str, int, Tensor]]:
    """(method, layer, [B, m]) of one batch."""
    model, batch = reader.model, len(labels)
    used = [i for i, m in enumerate(model.counts) if m]
    found: list[tuple[str, int, Tensor]] = []

    def add(i: int, grad: Tensor) -> None:
        """With each sample's gradient by layer i's prompts, [B, m, D] or [B, 2, m, H*d]."""
        grad = _rows(grad, model.kind)
        product = grad * _rows(model.prompts[i].detach(), model.kind)
        if "taylor" in methods:
            found.append(("taylor", i, product.norm(dim=-1)))
        if "taylor-inner" in methods:
            found.append(("taylor-inner", i, product.sum(-1).abs()))

    shallow = model.kind == "shallow"
    give = _give_prompts if shallow or model.path == "concat" else _give_keys
    differentiated = used if {"taylor", "taylor-inner"} & set(methods) else []
    watched = range(len(model.layers)) if shallow else used
    with (
        _observed(model, watched, methods, batch) as observers,
        torch.enable_grad(),
        give(model, differentiated, batch, add) as (prompts, leaves),
    ):
        losses = reader.losses(prompts, images, labels)
        gates = [o.gate for o in observers.values() if o.gate is not None]
        if leaves or gates:
            losses.sum().backward(inputs=[*leaves, *gates])
    if sorted({i for _, i, _ in found}) != differentiated:
        raise RuntimeError("model: some prompts have no influence on the loss")
    if gates:
        slopes: list[Any] = [gate.grad for gate in gates]
        for i, slope in zip(used, _per_prompts(model, slopes), strict=True):
            found.append(("gate", i, torch.stack(slope).sum(0).abs()))
    if "cls-attention" in methods:
        weights = [torch.stack(o.cls_attention).mean(0) for o in observers.values()]
        for i, weight in zip(used, _per_prompts(model, weights), strict=True):
            found.append(("cls-attention", i, torch.stack(weight).mean(0)))
    return found


AddGradient = Callable[[int, Tensor], None]
Given = tuple[dict[str, Tensor], list[Tensor]]


@contextmanager
def _give_keys(model: VPT, layers: Sequence[int], batch: int, add: AddGradient) -> Iterator[Given]:
    """Gives every sample keys and values of its own, which take no memory of their own.

    A prompt acts on a sample through its key and value alone, and these are the same for all. So
    they are computed once; their gradients are each sample's; and what lies between them and the
    prompt, whatever the block has there, is differentiated for all samples in one batch, layer by
    layer as the backward pass comes by.
    """
    leaves: list[Tensor] = []
    with ExitStack() as stack:
        try:
            for i in layers:
                prompt = model.prompts[i].detach().requires_grad_()
                pairs = model.layers[i].prefixes(prompt)
                shared = [tensor for pair in pairs for tensor in pair]
                own = [t.detach().expand(batch, *t.shape).requires_grad_() for t in shared]
                model.layers[i].given = list(zip(own[::2], own[1::2], strict=True))
                stack.enter_context(_when_done(own, partial(_to_prompts, i, prompt, shared, add)))
                leaves += own
            yield {}, leaves
        finally:
            for layer in model.layers:
                layer.given = None


def _to_prompts(
    i: int, prompt: Tensor, shared: list[Tensor], add: AddGradient, grads: list[Tensor]
) -> None:
    """From the gradients of keys and values, each [B, H, m, d], to those of the prompts."""

    def back(grads: Sequence[Tensor], batched: bool) -> Tensor:
        return torch.autograd.grad(
            shared, prompt, grads, retain_graph=True, is_grads_batched=batched
        )[0]

    try:
        found = back(grads, True)
    except RuntimeError:  # an operation of the block's own that torch cannot batch
        found = torch.stack([back(one, False) for one in zip(*grads, strict=True)])
    add(i, found)


@contextmanager
def _give_prompts(
    model: VPT, layers: Sequence[int], batch: int, add: AddGradient
) -> Iterator[Given]:
    """Gives every sample prompts of its own, for paths that prompts take as tokens."""
    own = {
        i: model.prompts[i].detach().expand(batch, *model.prompts[i].shape).requires_grad_()
        for i in layers
    }
    with ExitStack() as stack:
        for i, leaf in own.items():
            stack.enter_context(_when_done([leaf], partial(_as_they_are, i, add)))
        yield {f"prompts.{i}": leaf for i, leaf in own.items()}, list(own.values())


def _as_they_are(i: int, add: AddGradient, grads: list[Tensor]) -> None:
    add(i, grads[0])


@contextmanager
def _when_done(leaves: list[Tensor], then: Callable[[list[Tensor]], None]) -> Iterator[None]:
    """Calls with the gradients of all once the backward pass has them, and does not keep them."""

    def arrived(_: Tensor) -> None:
        if all(leaf.grad is not None for leaf in leaves):
            grads: list[Any] = [leaf.grad for leaf in leaves]
            for leaf in leaves:
                leaf.grad = None
            then(grads)

    handles = [leaf.register_post_accumulate_grad_hook(arrived) for leaf in leaves]
    try:
        yield
    finally:
        for handle in handles:  # else leaf and hook hold each other, out of the collector's sight
            handle.remove()


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


@torch.no_grad()
def _by_removal(reader: _Reader, name: str) -> Scores:
    """Leaves out (or zeroes) one prompt at a time: sum(counts) forward passes over the data."""
    model = reader.model
    change = _without_row if name == "exact" else _with_zero_row
    totals = [torch.zeros(m, dtype=torch.float64) for m in model.counts]
    for images, labels in reader.batches(name):
        whole = reader.losses({}, images, labels)
        for layer, count in enumerate(model.counts):
            for i in range(count):
                prompts = change(model.prompts[layer].detach(), i)
                losses = reader.losses({f"prompts.{layer}": prompts}, images, labels)
                totals[layer][i] += float((losses - whole).abs().double().sum())
    return [t / reader.samples for t in totals]


def _without_row(prompts: Tensor, i: int) -> Tensor:
    return torch.cat([prompts[..., :i, :], prompts[..., i + 1 :, :]], dim=-2)


def _with_zero_row(prompts: Tensor, i: int) -> Tensor:
    changed = prompts.clone()
    changed[..., i, :] = 0
    return changed
