"""Prompts that start from what the backbone makes of images (VPT paper, App. D)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pcx.backbones.spec import BackboneSpec
from pcx.extras import need
from pcx.tasks.batches import check_images, check_loader, images_and_labels

INITS = ("published", "cls-prototype", "patch-prototype")
MOST = 20_000  # patch tokens of a layer that are clustered


@torch.no_grad()
def prototypes(
    backbone: nn.Module, spec: BackboneSpec, loader: Any, init: str, counts: list[int]
) -> list[Tensor]:
    """The prompts of each layer, by the tokens that come into it.

    Args:
        backbone: a model's own copy, in eval mode, without prompts.
        spec: of the backbone.
        loader: yields (images, labels), labels as one class per image.
        init: "cls-prototype": the mean [CLS] token of each class, as many as there are classes;
            "patch-prototype": the centres of clusters of patch tokens by k-means.
        counts: prompts of each layer.

    Returns:
        [m, D] of each layer, in the dtype of the backbone.

    Raises:
        ValueError: there is no [CLS], the counts are not the number of classes, or there are fewer
            patch tokens than prompts.
    """
    check_loader(loader, "images")
    if init == "cls-prototype" and not spec.has_cls:
        raise ValueError(f"init: {init!r}, and {spec.family} has no [CLS]; use 'patch-prototype'")
    kept: Any = _Means() if init == "cls-prototype" else _Some(spec.prefix_tokens)
    like, images_seen = next(backbone.parameters()), 0
    with _inputs(backbone, spec, counts) as seen:
        for batch in loader:
            images, labels = images_and_labels(batch)
            check_images(images)
            seen.clear()
            backbone(images.to(like.device, like.dtype))
            images_seen += len(images)
            kept.add(seen, labels)
    if not images_seen:
        raise ValueError("images: the loader yields none; give one that does")
    found = iter(kept.prompts([m for m in counts if m]))
    width = spec.blocks[0].dim
    return [next(found).to(like) if m else like.new_empty(0, width) for m in counts]


class _Means:
    """The mean [CLS] token of each class, by sums."""

    def __init__(self) -> None:
        self.sums: dict[Any, list[Tensor]] = {}
        self.counts: dict[Any, int] = {}

    def add(self, seen: list[Tensor], labels: Any) -> None:
        classes = labels.tolist() if isinstance(labels, Tensor) else list(labels)
        rows = [x[:, 0].double().cpu() for x in seen]
        for i, label in enumerate(classes):
            before = self.sums.get(label, [torch.zeros_like(row[i]) for row in rows])
            self.sums[label] = [total + row[i] for total, row in zip(before, rows, strict=True)]
            self.counts[label] = self.counts.get(label, 0) + 1

    def prompts(self, counts: list[int]) -> list[Tensor]:
        classes = sorted(self.sums, key=str)
        if any(m != len(classes) for m in counts):
            raise ValueError(
                f"num_prompts: {max(counts)}, and init='cls-prototype' gives one prompt for each "
                f"of the {len(classes)} classes; give {len(classes)}"
            )
        means = {c: [total / self.counts[c] for total in self.sums[c]] for c in classes}
        return [torch.stack([means[c][i] for c in classes]) for i in range(len(counts))]


class _Some:
    """Some patch tokens of each layer, evenly chosen, at most twice `MOST`."""

    def __init__(self, prefix_tokens: int):
        self.prefix_tokens = prefix_tokens
        self.tokens: list[Tensor] = []

    def add(self, seen: list[Tensor], labels: Any) -> None:
        new = [_evenly(x[:, self.prefix_tokens :].flatten(0, 1)).cpu() for x in seen]
        before = self.tokens or [x[:0] for x in new]
        both = [torch.cat(pair) for pair in zip(before, new, strict=True)]
        self.tokens = [_evenly(x) if len(x) > 2 * MOST else x for x in both]

    def prompts(self, counts: list[int]) -> list[Tensor]:
        return [_centres(_evenly(x), m) for x, m in zip(self.tokens, counts, strict=True)]


def _evenly(tokens: Tensor) -> Tensor:
    """At most `MOST` of the rows."""
    return tokens[torch.linspace(0, len(tokens) - 1, min(MOST, len(tokens))).long()]


@contextmanager
def _inputs(backbone: nn.Module, spec: BackboneSpec, counts: list[int]) -> Iterator[list[Tensor]]:
    """A list that each forward adds what comes into the blocks that are to have prompts to."""
    seen: list[Tensor] = []
    hooks = [
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for block, m in zip(spec.blocks_in(backbone), counts, strict=True)
        if m
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _centres(tokens: Tensor, m: int) -> Tensor:
    need("sklearn", "init='patch-prototype'")
    from sklearn.cluster import KMeans

    if len(tokens) < m:
        raise ValueError(
            f"images: {len(tokens)} patch tokens for {m} prompts; give more images, or fewer "
            "prompts"
        )
    found = KMeans(m, n_init=1, random_state=0).fit(tokens.double().numpy())
    return torch.from_numpy(found.cluster_centers_)
