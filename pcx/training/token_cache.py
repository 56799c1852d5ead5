"""Training from kept tokens: what a backbone's first block reads, computed once for each image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from pcx.backbones.outputs import logits_of
from pcx.models.base import TunedModel
from pcx.models.peft_model import known_by
from pcx.training.batches import images_and_labels
from pcx.training.loaders import is_augmented, rebuilt

CACHES = (None, "tokens")
ADVICE = "use cache=None, and pcx.tasks.cached where decoding takes the time"


class FromTokens(nn.Module):
    """Runs a model from its first block's input on.

    What comes before that block is run on one image, whatever the batch, and its tokens are
    replaced by the given ones.

    Args:
        model: a tuned model.
        image: [1, 3, H, W], any.
    """

    def __init__(self, model: TunedModel, image: Tensor):
        super().__init__()
        self.model, self._image = model, image
        self._given: Tensor | None = None
        (first, *_) = model.spec.blocks_in(model.plain_backbone())
        self._hook = first.register_forward_pre_hook(self._replace, prepend=True)

    def forward(self, tokens: Tensor) -> Any:
        """Maps tokens [B, N, D] to what the model gives for their images."""
        self._given = tokens
        try:
            return self.model(self._image)
        finally:
            self._given = None

    def _replace(self, first: nn.Module, given: tuple) -> tuple | None:
        return None if self._given is None else (self._given, *given[1:])

    def remove(self) -> None:
        """Leaves the model as it was."""
        self._hook.remove()


class _Arrived(Exception):
    def __init__(self, tokens: Tensor):
        super().__init__()
        self.tokens = tokens


def tokens_of(model: TunedModel, images: Tensor) -> Tensor:
    """What the first block is given for images; the rest of the model is not run."""

    def arrive(first: nn.Module, given: tuple) -> None:
        if not given or not isinstance(given[0], Tensor):
            raise ValueError(f"cache: {type(first).__name__} takes no tokens; {ADVICE}")
        raise _Arrived(given[0])

    (first, *_) = model.spec.blocks_in(model.plain_backbone())
    hook = first.register_forward_pre_hook(arrive, prepend=True)
    try:
        model(images)
    except _Arrived as arrived:
        return arrived.tokens
    finally:
        hook.remove()
    raise ValueError(f"cache: the model does not run its first block; {ADVICE}")


class TokenSet(Dataset):
    """Tokens and labels of all samples of a data set, given out a batch at a time.

    Args:
        tokens: [n, N, D].
        labels: [n, ...].
    """

    def __init__(self, tokens: Tensor, labels: Tensor):
        self.tokens, self.labels = tokens, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, places: list[int]) -> tuple[Tensor, Tensor]:
        """A whole batch, which needs no collation."""
        at = torch.as_tensor(places)
        return self.tokens[at.to(self.tokens.device)], self.labels[at]

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        return self.tokens[place], self.labels[place]


def cached_tokens(
    model: nn.Module, loader: Any, accelerator: Accelerator
) -> tuple[FromTokens, DataLoader]:
    """Computes the tokens of a loader's data set, and gives what trains from them.

    Tokens lie on the model's device where they fill less than half of its free memory, else in main
    memory. Every process keeps all of them.

    Args:
        model: in the mode of training, on the accelerator's device.
        loader: a `DataLoader` over a map-style data set, whose samples are the same on each read.
        accelerator: of the training.

    Returns:
        A module that takes tokens in the place of images, and a loader of tokens in the place of
        that of images, in the same order.

    Raises:
        ValueError: the model is not a tuned one, or what comes before its first block is trained,
            random or not each image's own; the loader or its samples do not fit; or there is not
            enough memory.
    """
    tuned = known_by(model)
    if tuned is None or not tuned.spec.blocks:
        raise ValueError(f"cache: 'tokens' needs a tuned model with blocks; {ADVICE}")
    dataset = _checked_data(loader)
    images, _ = images_and_labels(loader.collate_fn([dataset[i] for i in _first(dataset)]))
    if not isinstance(images, Tensor):
        raise ValueError(f"cache: images are a {type(images).__name__}, expected a tensor")
    images = images.to(accelerator.device)
    _check_model(tuned, images, accelerator)
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", 64)
    plain = rebuilt(loader, dataset, batch_size=size)
    kept = TokenSet(*_all_tokens(tuned, plain, len(dataset), accelerator))
    return FromTokens(tuned, images[:1]), _in_the_order_of(loader, kept)


def _first(dataset: Any) -> range:
    return range(min(8, len(dataset)))


def _checked_data(loader: Any) -> Any:
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            "cache: 'tokens' needs a DataLoader over a map-style data set, whose samples can be "
            f"told apart; {ADVICE}"
        )
    dataset: Any = loader.dataset
    if is_augmented(dataset):
        raise ValueError(
            "cache: 'tokens' are the same in every epoch, but the data set's transform has random "
            "parts; give it one without, such as its eval_transform, or use cache=None"
        )
    for i in _first(dataset):
        if not _same(dataset[i], dataset[i]):
            raise ValueError(
                f"cache: 'tokens' are the same in every epoch, but dataset[{i}] gave two different "
                "samples; take random parts out of the data set, or use cache=None"
            )
    return dataset


def _same(a: Any, b: Any) -> bool:
    leaves = [torch.utils._pytree.tree_leaves(x) for x in (a, b)]
    return len(leaves[0]) == len(leaves[1]) and all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(*leaves, strict=True)
    )


def _check_model(model: TunedModel, images: Tensor, accelerator: Accelerator) -> None:
    """Raises a ValueError where training from tokens would not be training from images."""
    with torch.enable_grad(), accelerator.autocast():
        tokens = tokens_of(model, images)
    if tokens.requires_grad:
        raise ValueError(
            "cache: 'tokens' needs everything before the first block to be frozen; use cache=None"
        )
    if len(tokens) != len(images):
        raise ValueError(f"cache: the first block is not given a row for each image; {ADVICE}")
    with torch.no_grad(), accelerator.autocast():
        if not torch.equal(tokens_of(model, images), tokens):
            raise ValueError(
                "cache: 'tokens' needs that nothing before the first block is random, such as a "
                "patch or position dropout; switch it off, or use cache=None"
            )
    with _evaluating(model), torch.no_grad(), accelerator.autocast():
        expected = logits_of(model(images)).float()
        trial = FromTokens(model, images[:1])
        try:
            found = logits_of(trial(tokens_of(model, images))).float()
        finally:
            trial.remove()
    rounding = 1e-3 if accelerator.mixed_precision == "no" else 2e-2
    same = found.shape == expected.shape
    if not same or (found - expected).norm() > rounding * expected.norm():
        raise ValueError(f"cache: the model reads more than its first block's tokens; {ADVICE}")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def _all_tokens(
    model: TunedModel, loader: DataLoader, count: int, accelerator: Accelerator
) -> tuple[Tensor, Tensor]:
    kept: Tensor | None = None
    labels, done = [], 0
    for batch in loader:
        images, targets = images_and_labels(batch)
        with accelerator.autocast():
            tokens = tokens_of(model, images.to(accelerator.device))
        if kept is None:
            kept = _room(tokens, count)
        elif tokens.shape[1:] != kept.shape[1:]:
            raise ValueError(
                f"cache: images give tokens {tuple(tokens.shape[1:])} and "
                f"{tuple(kept.shape[1:])}; bring all images to one size, or use cache=None"
            )
        kept[done : done + len(tokens)] = tokens
        labels.append(targets)
        done += len(tokens)
    if kept is None or done != count:
        raise ValueError(f"cache: the loader gave {done} of {count} samples; {ADVICE}")
    return kept, torch.cat(labels)


def _room(tokens: Tensor, count: int) -> Tensor:
    """Memory for the tokens of all samples: on their device, or else in main memory."""
    needed = tokens[0].numel() * tokens.element_size() * count
    if tokens.is_cuda and needed < torch.cuda.mem_get_info(tokens.device)[0] / 2:
        return tokens.new_empty(count, *tokens.shape[1:])
    free = psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"cache: 'tokens' of {count} images take {needed / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free; {ADVICE}"
        )
    return torch.empty(count, *tokens.shape[1:], dtype=tokens.dtype)


def _in_the_order_of(loader: DataLoader, kept: TokenSet) -> DataLoader:
    """A loader of kept tokens that draws as the given one does."""
    batches: Any = loader.batch_sampler
    order: dict[str, Any] = {"batch_sampler": batches}
    if type(batches) is BatchSampler:
        order = {
            "batch_size": loader.batch_size,
            "sampler": loader.sampler,
            "drop_last": loader.drop_last,
        }
    elif batches is None:
        raise ValueError(f"cache: 'tokens' needs a loader with a batch_size; {ADVICE}")
    pinned = loader.pin_memory and not kept.tokens.is_cuda
    return DataLoader(
        kept, collate_fn=_as_it_is, generator=loader.generator, pin_memory=pinned, **order
    )


def _as_it_is(batch: Any) -> Any:
    return batch
