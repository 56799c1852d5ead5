"""How much each prompt matters, from gradients, attention or its real removal."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, DataLoaderShard
from accelerate.utils import send_to_device
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DistributedSampler, IterableDataset

from pcx.amp import AMP, weights_cast
from pcx.data import data_config, plain_loader, rebuilt
from pcx.evaluate import (
    Criterion,
    check_labels,
    criterion_name,
    images_and_labels,
    label_range,
    per_sample_loss,
)
from pcx.files import written_whole
from pcx.fingerprint import fingerprint
from pcx.ops.prompt_score import prompt_score
from pcx.prompt_path import PromptPath
from pcx.prompted_block import Observer
from pcx.replay import Replayed
from pcx.vpt import VPT

GRADIENT = ("taylor", "taylor-inner", "gate")
ONE_PASS = (*GRADIENT, "cls-attention")
REMOVAL = ("exact", "exact-zero")
METHODS = (*ONE_PASS, "magnitude", "random", *REMOVAL)

FLOAT16_LOSS_SCALE = 1024.0  # of the sum over a batch; gradients would vanish without

Scores = list[Tensor]
AddScores = Callable[[int, Tensor], None]  # of a layer, [2, B, m] as prompt_score gives them


@overload
def score(
    model: VPT,
    loader,
    *,
    method: str = "taylor",
    criterion: Criterion | None = None,
    amp: str = "no",
    cuda_graph: bool = False,
    seed: int = 0,
    checkpoint_dir: str | os.PathLike | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Scores: ...


@overload
def score(
    model: VPT,
    loader,
    *,
    method: Sequence[str],
    criterion: Criterion | None = None,
    amp: str = "no",
    cuda_graph: bool = False,
    seed: int = 0,
    checkpoint_dir: str | os.PathLike | None = None,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Scores]: ...


def score(
    model: VPT,
    loader,
    *,
    method: str | Sequence[str] = "taylor",
    criterion: Criterion | None = None,
    amp: str = "no",
    cuda_graph: bool = False,
    seed: int = 0,
    checkpoint_dir: str | os.PathLike | None = None,
    resume: bool = False,
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

    Each sample is read once, in order, without augmentation, dropout or a dropped last batch. Where
    torch.distributed is initialised, all processes must call this; each reads its share of the
    batches, and all get the scores of the whole data set.

    Args:
        model: a VPT; not changed.
        loader: yields (images, labels); not divided among processes.
        method: a method, or several, whose gradients then come from the same pass.
        criterion: (logits, labels) -> one loss per sample [B]; cross-entropy by default.
        amp: "no", "bf16" or "fp16", of what is differentiated. The small differences of "exact" and
            "exact-zero" would drown in it and are always computed without.
        cuda_graph: on CUDA, record what one batch's gradients take in a CUDA graph and replay it
            for all batches of that shape, so that no slow CPU holds the GPU up. The model and the
            criterion must not wait for the GPU. Takes twice the memory. Not for "exact" and
            "exact-zero".
        seed: of "random".
        checkpoint_dir: folder for the sums so far of "exact" and "exact-zero", a file each, written
            whole or not at all after every batch.
        resume: continue from those files, where they exist. Other data of the same description
            (number of samples, transform) is not noticed.
        progress: show a bar and what was read.

    Returns:
        Per layer, [m_l] float64 on the CPU; for several methods a dict of such lists.

    Raises:
        ValueError: no such method, an empty loader, a model without prompts or (cls-attention)
            without [CLS], a criterion that does not give one value per sample, a loss that is not
            finite (names the sample), float16 that overflows, a checkpoint of other scores, or
            cuda_graph on a CPU or of what cannot be recorded.
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
    if amp not in AMP:
        raise ValueError(f"amp: got {amp!r}, expected one of {tuple(AMP)}")
    if cuda_graph and model.prompts[0].device.type != "cuda":
        raise ValueError(f"cuda_graph: the model is on {model.prompts[0].device}, expected CUDA")
    if resume and checkpoint_dir is None:
        raise ValueError("resume: needs checkpoint_dir")
    if checkpoint_dir is not None:
        if not set(REMOVAL) & set(methods):
            raise ValueError(f"checkpoint_dir: only {REMOVAL} keep sums, got {methods}")
        if Path(checkpoint_dir).exists() and not Path(checkpoint_dir).is_dir():
            raise ValueError(f"checkpoint_dir: {checkpoint_dir} is a file, expected a folder")
    found = _without_data(model, methods, seed)
    if set(methods) - set(found):
        plain = plain_loader(loader, data_config(model))
        with _as_scored(model):
            reader = _Reader(model, plain.loader, criterion, AMP[amp], progress)
            with weights_cast(model.backbone, AMP[amp]):
                found |= _one_pass(reader, [m for m in methods if m in ONE_PASS], cuda_graph)
            for name in REMOVAL:
                if name in methods:
                    sums = _Sums(reader, name, plain.description, checkpoint_dir, resume)
                    found[name] = _by_removal(reader, name, sums)
        Console(quiet=not progress or reader.rank > 0).print(
            f"scored {sum(model.counts)} prompts on {reader.total} samples; {plain.description}"
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
    was_training = model.training
    as_is = not any(module.training for module in model.modules())
    layers = [layer.checkpoint for layer in model.layers]
    backbone_too = getattr(model.backbone, "grad_checkpointing", None)
    if not as_is:
        model.eval()
    model.set_grad_checkpointing(False)
    if backbone_too is not None:
        model.backbone.grad_checkpointing = False
    try:
        with torch.inference_mode(False):
            yield
    finally:
        if not as_is:
            model.train(was_training)
        for layer, checkpoint in zip(model.layers, layers, strict=True):
            layer.checkpoint = checkpoint
        if backbone_too is not None:
            model.backbone.grad_checkpointing = backbone_too


class _Reader:
    """Yields this process's share of the batches on the model's device and counts its samples."""

    def __init__(
        self,
        model: VPT,
        loader: Any,
        criterion: Criterion | None,
        amp: torch.dtype | None,
        progress: bool,
    ):
        self.model, self.criterion, self.amp = model, criterion, amp
        self.device = model.prompts[0].device
        self.loss_scale = FLOAT16_LOSS_SCALE if amp == torch.float16 else 1.0
        self.rank, self.processes = _processes()
        self.loader = _share(loader, self.rank, self.processes)
        self.samples = self.number = 0  # samples read here in this pass, and batches
        self.total = 0  # read by all processes
        self.classes: int | None = None  # of the logits seen so far
        self.labels = (0, 0)  # lowest and highest of this batch
        self.bar = Progress(disable=not progress or self.rank > 0, transient=True)

    def batches(
        self, note: str, steps: int = 1, done: tuple[int, int] = (0, 0)
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Those behind the (batches, samples) that are done; the consumer calls `step` after each
        of a batch's `steps` but the last."""
        try:
            total = len(self.loader) * steps
        except TypeError:  # of an iterable data set
            total = None
        self.samples = self.number = 0
        with self.bar:
            task = self.bar.add_task(note, total=total, completed=done[0] * steps)
            for batch in self.loader:
                self.number += 1
                images, labels = images_and_labels(batch)
                if not isinstance(labels, Tensor) or not labels.dim():
                    raise ValueError("loader: it yields single samples; give it a batch_size")
                if self.number > done[0] and len(labels):
                    self._look_at(labels)
                    yield send_to_device((images, labels), self.device)
                    self.step()
                self.samples += len(labels)
                if self.number == done[0]:
                    self._check_done(done)
            if self.number < done[0]:
                self._check_done(done)
            self.bar.remove_task(task)

    def _look_at(self, labels: Tensor) -> None:
        """Before they go to a GPU, which would have to be waited for, and where wrong ones end all.

        What else could be wrong with them `per_sample_loss` says.
        """
        if self.criterion is None and labels.dim() == 1 and not labels.is_floating_point():
            self.labels = label_range(labels.long())
            if self.classes is not None:
                check_labels(self.labels, self.classes)

    def _check_done(self, done: tuple[int, int]) -> None:
        if (self.number, self.samples) != done:
            raise ValueError(
                f"resume: {done[1]} samples in {done[0]} batches are done, where the loader gives "
                f"{self.samples} in {self.number}; give the same one, or another checkpoint_dir"
            )

    def step(self) -> None:
        for task in self.bar.task_ids:
            self.bar.advance(task)

    def autocast(self) -> AbstractContextManager:
        if self.amp is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.amp)

    def losses(
        self, prompts: dict[str, Tensor], images: Tensor, labels: Tensor, *, precise: bool = False
    ) -> Tensor:
        """The loss of each sample with some prompts swapped for others, [B], to be checked."""
        with nullcontext() if precise else self.autocast():
            if prompts:
                logits = functional_call(self.model, prompts, (images,))
            else:
                logits = self.model(images)
        self.classes = logits.shape[-1]
        check_labels(self.labels, self.classes)
        return per_sample_loss(logits, labels, self.criterion, check=False)

    def check(self, losses: Tensor) -> Tensor:
        """Waits for the losses of the batch at hand and gives them back."""
        bad = (~losses.detach().isfinite()).nonzero()
        if len(bad):
            of = f" of process {self.rank}" if self.processes > 1 else ""
            raise ValueError(
                f"loader: the loss of sample {self.samples + int(bad[0])}{of} is not finite"
            )
        return losses

    def means(self, totals: list[Tensor]) -> Scores:
        """Over the samples of all processes, from this one's sums [m_l] float64."""
        sums = torch.cat([*totals, totals[0].new_tensor([self.samples])])
        if self.processes > 1:
            torch.distributed.all_reduce(sums)
        self.total = int(sums[-1])
        if not self.total:
            raise ValueError("loader: it yielded no sample (an iterator can be read only once)")
        if not sums.isfinite().all():
            raise ValueError(
                "model: its gradients overflow in float16; give float32 weights, or amp='bf16'"
            )
        return [s.cpu() for s in (sums[:-1] / self.total).split([len(t) for t in totals])]


def _processes() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed:
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _share(loader: Any, rank: int, processes: int) -> Any:
    """Every `processes`-th batch, the others not even read where the loader lets them be."""
    if processes == 1:
        return loader
    batches = getattr(loader, "batch_sampler", None)
    divided = (BatchSamplerShard, DataLoaderShard, DataLoaderDispatcher, DistributedSampler)
    if any(isinstance(x, divided) for x in (loader, batches, getattr(loader, "sampler", None))):
        raise ValueError(
            "loader: it is divided among processes already; give the one that reads everything"
        )
    if batches is None or isinstance(loader.dataset, IterableDataset):
        return _Every(loader, rank, processes)
    return rebuilt(loader, loader.dataset, batch_sampler=_Every(batches, rank, processes))


class _Every:
    """Every `step`-th of what `items` gives, each time that it is iterated."""

    def __init__(self, items: Any, first: int, step: int):
        self.items, self.first, self.step = items, first, step

    def __iter__(self) -> Iterator:
        return itertools.islice(self.items, self.first, None, self.step)

    def __len__(self) -> int:
        return len(range(self.first, len(self.items), self.step))


def _one_pass(reader: _Reader, methods: Sequence[str], cuda_graph: bool) -> dict[str, Scores]:
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


def _zeros(reader: _Reader) -> list[Tensor]:
    return [torch.zeros(m, dtype=torch.float64, device=reader.device) for m in reader.model.counts]


class _GradientPass:
    """What one pass over the data computes, and what all its batches have in common."""

    def __init__(self, reader: _Reader, methods: Sequence[str]):
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


class _Sums:
    """Sums over the batches so far, kept in a file where there is a folder for it."""

    def __init__(
        self,
        reader: _Reader,
        name: str,
        data: str,
        folder: str | os.PathLike | None,
        resume: bool,
    ):
        self.totals, self.batches, self.samples = _zeros(reader), 0, 0
        self.file: Path | None = None
        if folder is None:
            return
        share = f"-{reader.rank}of{reader.processes}" if reader.processes > 1 else ""
        self.file = Path(folder) / f"{name}{share}.pt"
        self.run = {
            "data": data,
            "model": fingerprint(reader.model.state_dict().items()),
            "criterion": criterion_name(reader.criterion),
        }
        if resume and self.file.exists():
            self._load(self.file, reader.device)

    def _load(self, file: Path, device: torch.device) -> None:
        try:
            state = torch.load(file, map_location=device, weights_only=True)
            other = [key for key in self.run if state["run"][key] != self.run[key]]
            totals, self.batches, self.samples = (
                state[key] for key in ("totals", "batches", "samples")
            )
        except Exception as error:
            raise ValueError(
                f"checkpoint_dir: {file} is no file of pcx.score ({error!r})"
            ) from error
        if other:
            raise ValueError(
                f"resume: {file} is of another {' and '.join(other)}; give the same, or "
                "another checkpoint_dir"
            )
        self.totals = totals

    def save(self, batches: int, samples: int) -> None:
        if self.file is None:
            return
        state = {
            "run": self.run,
            "totals": self.totals,
            "batches": batches,
            "samples": samples,
        }
        with written_whole(self.file) as part:
            torch.save(state, part)


@torch.no_grad()
def _by_removal(reader: _Reader, name: str, sums: _Sums) -> Scores:
    """Leaves out (or zeroes) one prompt at a time; layers below it are not computed again."""
    model = reader.model
    change = _without_row if name == "exact" else _with_zero_row
    steps = 1 + sum(model.counts)
    for images, labels in reader.batches(name, steps, (sums.batches, sums.samples)):
        with _replayed(model) as replay:
            whole = reader.check(reader.losses({}, images, labels, precise=True))
            for layer, count in enumerate(model.counts):
                replay(layer)
                for i in range(count):
                    reader.step()
                    prompts = change(model.prompts[layer].detach(), i)
                    changed = {f"prompts.{layer}": prompts}
                    losses = reader.losses(changed, images, labels, precise=True)
                    difference = reader.check(losses) - whole
                    sums.totals[layer][i] += difference.abs().double().sum()
        sums.save(reader.number, reader.samples + len(labels))
    return reader.means(sums.totals)


@contextmanager
def _replayed(model: VPT) -> Iterator[Callable[[int], None]]:
    """Keeps what each layer gives in the first forward; yields a function after which the layers
    below a given one give that again without computing it."""
    outputs: dict[int, Any] = {}

    def keep(i: int, module: nn.Module, arguments: Any, output: Any) -> None:
        outputs.setdefault(i, output)

    hooks = [layer.register_forward_hook(partial(keep, i)) for i, layer in enumerate(model.layers)]

    def replay(first: int) -> None:
        for i, layer in enumerate(model.layers):
            layer.replay = outputs[i] if i < first else None

    try:
        yield replay
    finally:
        for hook in hooks:
            hook.remove()
        for layer in model.layers:
            layer.replay = None


def _without_row(prompts: Tensor, i: int) -> Tensor:
    return torch.cat([prompts[..., :i, :], prompts[..., i + 1 :, :]], dim=-2)


def _with_zero_row(prompts: Tensor, i: int) -> Tensor:
    changed = prompts.clone()
    changed[..., i, :] = 0
    return changed
