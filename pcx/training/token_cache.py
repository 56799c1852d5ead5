"""Training from kept tokens: what a backbone's first block reads, computed once for each image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
)

from pcx.backbones.outputs import logits_of
from pcx.models.base import TunedModel, keeping_modes
from pcx.models.peft_model import known_by
from pcx.tasks.batches import images_and_labels, rows_of
from pcx.training.loaders import is_augmented, rebuilt

CACHES = (None, "tokens")
ADVICE = "train without cache='tokens' (--cache-tokens)"
TRIED = 8  # samples that are read several times before all are read once
SHARE = 0.8  # of the free memory that tokens may fill


class FromTokens(nn.Module):
    """Runs a model from its first block's input on.

    What comes before that block is run on one image, whatever the batch, and its tokens are
    replaced by the given ones, while it is attached to the model.

    Args:
        model: a tuned model.
        image: [1, 3, H, W], any.
    """

    def __init__(self, model: TunedModel, image: Tensor):
        super().__init__()
        self.model, self._image = model, image
        self._given: Tensor | None = None
        self._hook: Any = None

    def attach(self) -> None:
        """Prepares the model to be given tokens."""
        self._hook = _first_block(self.model).register_forward_pre_hook(self._replace, prepend=True)

    def remove(self) -> None:
        """Leaves the model as it was."""
        if self._hook is not None:
            self._hook.remove()

    def forward(self, tokens: Tensor) -> Any:
        """Maps tokens [B, N, D] to what the model gives for their images."""
        self._given = tokens
        try:
            return self.model(self._image)
        finally:
            self._given = None

    def _replace(self, first: nn.Module, given: tuple) -> tuple | None:
        return None if self._given is None else (self._given, *given[1:])


class _Arrived(Exception):
    def __init__(self, tokens: Tensor):
        super().__init__()
        self.tokens = tokens


def _first_block(model: TunedModel) -> nn.Module:
    return model.spec.blocks_in(model.plain_backbone())[0]


def tokens_of(model: TunedModel, images: Tensor) -> Tensor:
    """What the first block is given for images; the rest of the model is not run."""

    def arrive(first: nn.Module, given: tuple) -> None:
        if not given or not isinstance(given[0], Tensor):
            raise ValueError(f"cache: {type(first).__name__} takes no tokens; {ADVICE}")
        raise _Arrived(given[0])

    hook = _first_block(model).register_forward_pre_hook(arrive, prepend=True)
    try:
        model(images)
    except _Arrived as arrived:
        return arrived.tokens
    finally:
        hook.remove()
    raise ValueError(f"cache: the model does not run its first block; {ADVICE}")


class TokenSet(Dataset):
    """Tokens and labels of samples of a data set, given out a batch at a time.

    Args:
        tokens: [n, N, D].
        labels: [n, ...].
        places: of the samples in the data set; None where these are all.
    """

    def __init__(self, tokens: Tensor, labels: Tensor, places: Sequence[int] | None = None):
        self.tokens, self.labels = tokens, labels
        self._rows = None if places is None else {place: i for i, place in enumerate(places)}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, places: list[int]) -> tuple[Tensor, Tensor]:
        """A whole batch, which needs no collation."""
        rows = places if self._rows is None else [self._rows[place] for place in places]
        at = torch.as_tensor(rows)
        return self.tokens[at.to(self.tokens.device)], self.labels[at]

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        tokens, labels = self.__getitems__([place])
        return tokens[0], labels[0]


def cached_tokens(
    model: nn.Module, loader: Any, accelerator: Accelerator
) -> tuple[FromTokens, DataLoader]:
    """Computes the tokens of a loader's data set, and gives what trains from them.

    Tokens lie on the model's device where they fill less than half of its free memory, else in main
    memory. Every process keeps all of them.

    Args:
        model: on the accelerator's device; left in the modes in which it was.
        loader: a `DataLoader` over a map-style data set, whose samples are the same on each read.
        accelerator: of the training.

    Returns:
        A module that takes tokens in the place of images, to be attached; and a loader of tokens in
        the place of that of images, in the same order.

    Raises:
        ValueError: the model is not a tuned one, or what comes before its first block is trained,
            random or not each image's own; the loader or its samples do not fit, as far as a few of
            them show; or there is not enough memory.
    """
    tuned = known_by(model)
    if tuned is None or not tuned.spec.blocks:
        raise ValueError(f"cache: 'tokens' needs a tuned model with blocks; {ADVICE}")
    places = _checked_places(loader)
    images = _checked_batch(loader, places).to(accelerator.device)
    with _as_it_was(tuned):
        tuned.train()
        _check_tokens(tuned, images, accelerator)
        tuned.eval()
        _check_gradients(tuned, images, accelerator)
        tuned.train()
        kept = TokenSet(*_all_tokens(tuned, loader, places, images, accelerator), places)
    return FromTokens(tuned, images[:1]), _in_the_order_of(loader, kept)


def _checked_places(loader: Any) -> Sequence[int]:
    """The places in the data set of the samples that a loader draws from.

    Raises:
        ValueError: it is no plain `DataLoader` over a map-style data set without random transforms.
    """
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            "cache: 'tokens' needs a torch.utils.data.DataLoader over a map-style data set, whose "
            f"samples can be told apart, got a {type(loader).__name__}; {ADVICE}"
        )
    if loader.batch_sampler is None:
        raise ValueError("loader: it yields single samples; give it a batch_size")
    dataset: Any = loader.dataset
    if is_augmented(dataset):
        raise ValueError(
            "cache: 'tokens' are the same in every epoch, but the data set's transform has random "
            f"parts; give it one without, such as its eval_transform, or {ADVICE}"
        )
    sampler = getattr(loader.batch_sampler, "sampler", None)
    if isinstance(sampler, SubsetRandomSampler):
        places: Sequence[int] = sorted({int(i) for i in sampler.indices})
    else:
        places = range(len(dataset))
    if not places:
        raise ValueError("loader: it yielded no sample")
    return places


def _checked_batch(loader: DataLoader, places: Sequence[int]) -> Tensor:
    """The images of a few samples from all over the data set.

    Raises:
        ValueError: their batch is not the same on each read, or mixes samples.
    """
    count = min(TRIED, len(places))
    tried = [places[i * (len(places) - 1) // max(count - 1, 1)] for i in range(count)]

    def read(some: list[int]) -> tuple[Tensor, Tensor]:
        images, labels = images_and_labels(loader.collate_fn([loader.dataset[i] for i in some]))
        labels = rows_of(labels)
        if not isinstance(images, Tensor):
            raise ValueError(
                f"cache: images are a {type(images).__name__}, expected a tensor; {ADVICE}"
            )
        return images, labels

    images, labels = read(tried)
    if not (_same(images, (again := read(tried))[0]) and _same(labels, again[1])):
        raise ValueError(
            "cache: 'tokens' are the same in every epoch, but two reads of the same samples "
            f"differ; take random parts out of the data set and the collate_fn, or {ADVICE}"
        )
    for row, place in enumerate(tried):
        image, label = read([place])
        if not (_same(image, images[row : row + 1]) and _same(label, labels[row : row + 1])):
            raise ValueError(
                "cache: 'tokens' are each image's own, but the loader's collate_fn gives a sample "
                f"otherwise in another batch; use one that does not mix samples, or {ADVICE}"
            )
    return images


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _check_tokens(model: TunedModel, images: Tensor, accelerator: Accelerator) -> None:
    """Raises a ValueError where the tokens of an image are not the same in every step."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.enable_grad(), accelerator.autocast():
        tokens = tokens_of(model, images)
    if tokens.requires_grad:
        raise ValueError(
            "cache: 'tokens' needs everything before the first block to be frozen (gradient "
            f"checkpointing of Hugging Face's models makes tokens differentiable); {ADVICE}"
        )
    if len(tokens) != len(images):
        raise ValueError(f"cache: the first block is not given a row for each image; {ADVICE}")
    with torch.no_grad(), accelerator.autocast():
        again = tokens_of(model, images)
        alone = torch.cat([tokens_of(model, image[None]) for image in images])
    if not torch.equal(again, tokens):
        raise ValueError(
            "cache: 'tokens' needs that nothing before the first block is random, such as a patch "
            f"or position dropout; switch it off, or {ADVICE}"
        )
    changed = [n for n, b in model.named_buffers() if not torch.equal(b, before[n])]
    if changed or not _is_close(alone, tokens, accelerator):
        why = f"{changed[0]} changes with each batch" if changed else "they depend on the batch"
        raise ValueError(f"cache: 'tokens' must be each image's own, but {why}; {ADVICE}")


def _check_gradients(model: TunedModel, images: Tensor, accelerator: Accelerator) -> None:
    """Raises a ValueError where logits or gradients from tokens are not those from images."""
    trained = [p for p in model.parameters() if p.requires_grad]
    run = FromTokens(model, images[:1])

    def outcome(call: nn.Module, x: Tensor) -> list[Tensor]:
        with torch.enable_grad(), accelerator.autocast():
            logits = logits_of(call(x)).float()
        slopes = torch.sin(torch.arange(logits.numel(), device=x.device)).view_as(logits)
        found = torch.autograd.grad(logits, trained, slopes.to(logits.dtype), allow_unused=True)
        return [logits.detach(), *(x.new_zeros(()) if g is None else g for g in found)]

    with torch.no_grad(), accelerator.autocast():
        tokens = tokens_of(model, images)
    expected = outcome(model, images)
    run.attach()
    try:
        found = outcome(run, tokens)
        same = all(_is_close(a, b, accelerator) for a, b in zip(found, expected, strict=True))
    except (RuntimeError, ValueError):  # a shape or a recomputation that does not fit
        same = False
    finally:
        run.remove()
    if not same:
        raise ValueError(
            "cache: the model reads more than its first block's tokens, or computes that block "
            f"again in its backward pass (gradient checkpointing); {ADVICE}"
        )


def _is_close(a: Tensor, b: Tensor, accelerator: Accelerator) -> bool:
    rounding = 3e-3 if accelerator.mixed_precision == "no" else 5e-2  # TF32; bfloat16
    return a.shape == b.shape and bool((a - b).norm() <= rounding * b.norm())


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Puts modes and buffers back."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with keeping_modes(model):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


@torch.no_grad()
def _all_tokens(
    model: TunedModel,
    loader: DataLoader,
    places: Sequence[int],
    first: Tensor,
    accelerator: Accelerator,
) -> tuple[Tensor, Tensor]:
    """The tokens and labels of all samples, in the order of their places."""
    some: Any = loader.dataset
    if len(places) < len(some):
        some = Subset(some, places)
    size = getattr(loader.batch_sampler, "batch_size", None) or 64
    with accelerator.autocast():
        kept = _room(tokens_of(model, first[:1]), len(places), accelerator.num_processes)
    labels, done = [], 0
    for batch in rebuilt(loader, some, batch_size=size):
        images, targets = images_and_labels(batch)
        if images.shape[1:] != first.shape[1:]:
            raise ValueError(
                f"cache: images {tuple(images.shape[1:])} and {tuple(first.shape[1:])} in one data "
                f"set; bring all to one size, or {ADVICE}"
            )
        with accelerator.autocast():
            tokens = tokens_of(model, images.to(accelerator.device))
        end = done + len(tokens)
        if end <= len(kept):
            kept[done:end] = tokens
        labels.append(targets)
        done = end
    if done != len(kept):
        raise ValueError(
            f"cache: the loader's collate_fn gave {done} of {len(kept)} samples; {ADVICE}"
        )
    return kept, torch.cat(labels)


def _room(tokens: Tensor, count: int, processes: int) -> Tensor:
    """Memory for the tokens of all samples: on their device, or else in main memory."""
    needed = tokens[0].numel() * tokens.element_size() * count
    if tokens.is_cuda and needed < torch.cuda.mem_get_info(tokens.device)[0] / 2:
        return tokens.new_empty(count, *tokens.shape[1:])
    free = SHARE * psutil.virtual_memory().available / processes
    if needed > free:
        raise ValueError(
            f"cache: 'tokens' of {count} images take {needed / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free for them; {ADVICE}, and use pcx.tasks.cached where "
            "decoding takes the time"
        )
    return torch.empty(count, *tokens.shape[1:], dtype=tokens.dtype)


def _in_the_order_of(loader: DataLoader, kept: TokenSet) -> DataLoader:
    """A loader of kept tokens that draws as the given one does."""
    batches: Any = loader.batch_sampler
    order: dict[str, Any] = {"batch_sampler": batches}
    if type(batches) is BatchSampler:
        order = {
            "batch_size": batches.batch_size,
            "sampler": batches.sampler,
            "drop_last": batches.drop_last,
        }
    pinned = loader.pin_memory and not kept.tokens.is_cuda
    return DataLoader(
        kept, collate_fn=_as_it_is, generator=loader.generator, pin_memory=pinned, **order
    )


def _as_it_is(batch: Any) -> Any:
    return batch
